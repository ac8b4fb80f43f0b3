"""Plugins by anyone: found when needed, reported when broken, and out of the way otherwise."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import command
import plugins
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner, Result

from mwtool import MwtoolError, __version__, scan_checkpoint, scan_model
from mwtool.architecture.registry import adapter_for, installed
from mwtool.cli import app
from mwtool.errors import BadPlugin
from mwtool.models.load import load
from mwtool.surgery.hooks import averaging
from mwtool.testing.kit import check_type, random_model, tiny_config

CWM = "cwm"
"""A type of transformers' with Llama's layout and no built-in adapter."""
FLEX = "flex_olmo"
"""One with routed experts."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable folder for made-up distributions; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def saved(tmp_path: Path, model_type: str) -> Path:
    model = random_model(tiny_config(model_type))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def tiny_mixture(tmp_path: Path) -> Path:
    return tiny.saved(tmp_path / "model", random_model(tiny_config(FLEX, num_experts=4, num_experts_per_tok=2)))


def test_an_installed_plugin_serves_its_type(tmp_path: Path, site: Path) -> None:
    folder = saved(tmp_path, CWM)
    with pytest.raises(
        MwtoolError, match=r"no adapter for model type 'cwm'; .*installed ones; `mwtool adapters new cwm"
    ):
        scan_checkpoint(str(folder))
    plugins.distribution(site, "their-cwm", CWM, plugins.source(CWM))
    assert len(scan_checkpoint(str(folder)).states) == 3
    assert ("cwm", "their-cwm", "1.2") in {(p.model_type, p.distribution, p.version) for p in installed()}
    assert check_type(CWM, adapter_for(CWM)).fault is None


def elsewhere(adds: str) -> str:
    """What the stream receives is said to come from a module that exists and has nothing to do with it."""
    return plugins.source(CWM).replace('adds=f"{path}.mlp"', adds)


BROKEN: list[tuple[str, str, str]] = [
    (
        "names what runs later",
        elsewhere('adds="model.norm"'),
        "model.norm is named for model.layers.0 but has not run",
    ),
    ("no name of a module", plugins.source(CWM).replace("DecoderLayer(path", "DecoderLayer(3"), "with a layer at 3"),
    ("experts that are none", elsewhere('adds=path, experts="x"'), "1 other FFNs in model.layers.0"),
    ("no up", plugins.source(CWM, "FFN(None, WeightSlice('x'), hook='lm_head')"), "failed for layer 0|up is None"),
    ("an activation that is no name", plugins.source(CWM, "gated_mlp(f'{path}.mlp', [])"), r"act is \[\]"),
    ("a word for a number", elsewhere('adds=path, scale="x"'), r"with scale 'x' in model.layers.0; expected a number"),
    ("raises on import", "raise OSError('no licence file')", "cannot be imported: OSError: no licence file"),
    ("no such object", "OTHER = 1", "cannot be imported: AttributeError"),
    ("not an adapter", "ADAPTER = 3", r"is 3; expected an object with a method layer"),
    ("a class", plugins.source(CWM).replace("Adapter()", "Adapter"), "expected an object with a method layer"),
    ("fails when asked", plugins.source(CWM, "1 / 0"), "failed for layer 0: ZeroDivisionError"),
    ("gives no FFN", plugins.source(CWM, '"mlp"'), "failed for layer|describes"),
    ("slices that do not exist", plugins.source(CWM, 'gated_mlp(f"{path}.ffn", "silu")'), "no module .*ffn.down_proj"),
    (
        "index out of range",
        plugins.source(
            CWM,
            "FFN(WeightSlice(f'{path}.mlp.up_proj.weight', (99,)), "
            "WeightSlice(f'{path}.mlp.down_proj.weight'), hook=f'{path}.mlp.down_proj')",
        ),
        r"up is .*\[99\], which cannot be read",
    ),
    (
        "shapes that do not fit",
        plugins.source(
            CWM,
            "FFN(WeightSlice(f'{path}.mlp.down_proj.weight'), "
            "WeightSlice(f'{path}.mlp.down_proj.weight'), hook=f'{path}.mlp.down_proj')",
        ),
        r"has shape \(32, 64\); expected \(64, 32\)",
    ),
]


@pytest.mark.parametrize(
    ("code", "cause"), [(code, cause) for _, code, cause in BROKEN], ids=[name for name, *_ in BROKEN]
)
def test_a_broken_plugin_is_reported_with_package_version_and_cause(
    tmp_path: Path, site: Path, code: str, cause: str
) -> None:
    folder = saved(tmp_path, CWM)
    plugins.distribution(site, "their-cwm", CWM, code)
    with pytest.raises(BadPlugin, match=rf"their_cwm:ADAPTER.*their-cwm 1\.2(?s:.*)(?:{cause})"):
        scan_checkpoint(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(BadPlugin, match="their-cwm"):
        scan_model(model)
    result = run("scan", str(folder))
    assert result.exit_code == 1 or isinstance(result.exception, BadPlugin)


COMBINED = [
    ("raises", "1 / 0", "combine of model.layers.0.mlp.experts failed: ZeroDivisionError: division by zero"),
    ("gives nothing", "pass", "combine of model.layers.0.mlp.experts failed: AttributeError"),
    (
        "is of another width",
        "return up[..., :3]",
        r"experts returned torch.float32 of shape \(.*3,?\); expected torch.float32",
    ),
    ("is of another dtype", "return up.double()", r"experts returned torch.float64 of .*; expected torch.float32"),
]


@pytest.mark.parametrize(
    ("body", "cause"), [(body, cause) for _, body, cause in COMBINED], ids=[name for name, *_ in COMBINED]
)
def test_a_function_of_a_plugin_that_fails_as_the_model_runs_is_reported_likewise(
    tmp_path: Path, site: Path, body: str, cause: str
) -> None:
    folder = tiny_mixture(tmp_path)
    plugins.distribution(site, "their-flex", FLEX, plugins.mixture(body))
    said = rf"^adapter 'their_flex:ADAPTER' \(their-flex 1\.2\): (?s:.*){cause}"
    with pytest.raises(BadPlugin, match=said):
        scan_checkpoint(str(folder))
    with pytest.raises(BadPlugin, match=said):
        scan_model(AutoModelForCausalLM.from_pretrained(folder))
    loaded = load(str(folder))
    with averaging(loaded.base, loaded.layers[0].ffns[0]), torch.no_grad(), pytest.raises(BadPlugin, match=said):
        loaded.base(input_ids=torch.arange(20)[None])


def test_it_is_one_line_at_the_terminal_too(tmp_path: Path, site: Path) -> None:
    folder = tiny_mixture(tmp_path)
    plugins.distribution(site, "their-flex", FLEX, plugins.mixture("1 / 0"))
    fault = command.run("scan", folder).fault
    assert re.match(r"adapter 'their_flex:ADAPTER' \(their-flex 1\.2\): combine of .* ZeroDivisionError", fault)


def test_a_function_of_a_plugin_that_works_is_used(tmp_path: Path, site: Path) -> None:
    folder = tiny_mixture(tmp_path)
    plugins.distribution(site, "their-flex", FLEX, plugins.mixture("return gate.sigmoid() * gate * up"))
    assert check_type(FLEX, adapter_for(FLEX)).fault is None
    assert len(scan_checkpoint(str(folder)).states) == 3


@pytest.mark.parametrize("module", ["x", "model.layers.0", "lm_head"])
def test_experts_that_are_elsewhere_are_told_of_before_they_are_read(tmp_path: Path, site: Path, module: str) -> None:
    folder = tiny_mixture(tmp_path)
    code = plugins.mixture("return up").replace(
        'experts = Experts(f"{path}.mlp.experts"', f'experts = Experts("{module}"'
    )
    code = code.replace("fused_experts(experts.module", 'fused_experts(f"{path}.mlp.experts"')
    plugins.distribution(site, "their-flex", FLEX, code)
    with pytest.raises(
        BadPlugin, match=rf"their-flex 1\.2\) does not fit .*: (there is no module |the parameters of )?{module}"
    ):
        scan_checkpoint(str(folder))


@pytest.mark.parametrize("code", [code for _, code, _ in BROKEN], ids=[name for name, *_ in BROKEN])
def test_a_broken_plugin_stops_no_command_that_does_not_need_it(tmp_path: Path, site: Path, code: str) -> None:
    plugins.distribution(site, "their-cwm", CWM, code)
    model = tiny.model("llama")
    tiny.plant(model)
    assert scan_checkpoint(str(tiny.saved(tmp_path / "llama", model))).massive is not None
    listed = run("adapters", "--json")
    assert listed.exit_code == 0
    assert {"cwm", "llama"} <= {entry["model_type"] for entry in json.loads(listed.stdout)["adapters"]}
    assert "their_cwm" not in sys.modules


def test_a_failing_import_is_tried_again_after_it_was_mended(tmp_path: Path, site: Path) -> None:
    plugins.distribution(site, "their-cwm", CWM, "raise OSError('no')")
    with pytest.raises(BadPlugin):
        adapter_for(CWM)
    (site / "their_cwm.py").write_text(plugins.source(CWM) + "# mended, and longer than before\n")
    assert check_type(CWM, adapter_for(CWM)).fault is None


def test_two_plugins_for_one_type_are_both_named_and_neither_is_taken(site: Path) -> None:
    plugins.distribution(site, "ours", CWM, plugins.source(CWM))
    plugins.distribution(site, "theirs", CWM, plugins.source(CWM))
    with pytest.raises(BadPlugin, match=r"'cwm' is claimed by ours \(ours:ADAPTER\) and theirs \(theirs:ADAPTER\)"):
        adapter_for(CWM)
    plugins.distribution(site, "their-llama", "llama", plugins.source("llama"))
    with pytest.raises(BadPlugin, match=r"claimed by mwtool .* and their-llama"):
        adapter_for("llama")
    assert adapter_for("mistral").plugin.distribution == "mwtool"


def test_a_plugins_own_refusal_of_a_model_reaches_the_user(site: Path) -> None:
    refusing = plugins.source(CWM).replace(
        "        path", "        raise UnsupportedModel('only short ones')\n        path"
    )
    plugins.distribution(site, "their-cwm", CWM, "from mwtool.layout import UnsupportedModel\n" + refusing)
    with pytest.raises(MwtoolError, match=r"^only short ones$"):
        adapter_for(CWM).layer(tiny_config(CWM), 0)


def test_help_and_the_bundled_model_import_no_third_party_plugin(tmp_path: Path) -> None:
    """In a process of its own, which has imported nothing yet; the last command shows that it would be noticed."""
    code = "import sys\nprint('imported', file=sys.stderr)\n" + plugins.source(CWM)
    plugins.distribution(tmp_path / "site", "their-cwm", CWM, code)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    commands = [["--help"], ["adapters"], ["scan", "demo", "--json"], ["adapters", "check", CWM]]
    script = f"""
import sys
from contextlib import suppress
from mwtool.cli import main
for arguments in {commands}:
    print("BEGIN", *arguments, file=sys.stderr)
    sys.argv = ["mwtool", *arguments]
    with suppress(SystemExit):
        main()
"""
    ran = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    *others, last = ran.stderr.split("BEGIN")[1:]
    assert len(others) == 3
    assert not any("imported" in said for said in others)
    assert "imported" in last


def test_check_prints_every_property_of_an_adapter() -> None:
    result = run("adapters", "check", "granite", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["schema"] == "mwtool.adapters.check/1"
    (checked,) = document["results"]
    assert checked["model_type"] == "granite"
    assert [check["passed"] for check in checked["checks"]] == [True] * 7
    assert "✓" in run("adapters", "check", "granite").stdout


def test_check_fails_with_one_line_and_the_table(site: Path) -> None:
    plugins.distribution(site, "their-cwm", CWM, plugins.source(CWM, 'gated_mlp(f"{path}.mlp", "relu")'))
    result = run("adapters", "check", CWM)
    assert "✗" in result.stdout
    assert isinstance(result.exception, BadPlugin)
    assert "cwm: output: model.layers.0.mlp" in str(result.exception)


def test_check_takes_a_module_and_an_object_not_installed(site: Path) -> None:
    (site / "draft.py").write_text(plugins.source(CWM))
    for target in ("draft:ADAPTER", "draft:Adapter"):
        document = json.loads(run("adapters", "check", target, "--json").stdout)
        assert [result["model_type"] for result in document["results"]] == [CWM]
    assert run("adapters", "check", "draft:ADAPTER", "--model-type", "llama").exit_code == 0
    assert isinstance(run("adapters", "check", "draft:NOTHING").exception, BadPlugin)
    assert run("adapters", "check", "llama", "--model-type", "llama").exit_code == 2


def test_check_goes_on_past_a_plugin_that_cannot_be_loaded(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.distribution(site, "their-cwm", CWM, "raise OSError('no')")
    few = [plugin for plugin in installed() if plugin.model_type in ("cwm", "llama")]
    monkeypatch.setattr("mwtool.architecture.registry.installed", lambda: few)
    result = run("adapters", "check", "--json")
    results = {one["model_type"]: one["checks"] for one in json.loads(result.stdout)["results"]}
    assert all(check["passed"] for check in results["llama"])
    assert "OSError: no" in results["cwm"][0]["detail"]
    assert isinstance(result.exception, BadPlugin)


def test_a_new_package_is_complete_and_conforms(tmp_path: Path, site: Path) -> None:
    """As pip would install it: its entry points from its own pyproject, its module on the path, its own test."""
    assert run("adapters", "new", CWM, str(tmp_path / "package")).exit_code == 0
    package = tmp_path / "package"
    project: dict[str, Any] = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    (name, value) = next(iter(project["entry-points"]["mwtool.adapters"].items()))
    plugins.distribution(site, project["name"], name, "", value=value)
    (site / "mwtool_cwm.py").unlink()
    shutil.copytree(package / "mwtool_cwm", site / "mwtool_cwm")
    assert check_type(CWM, adapter_for(CWM)).fault is None
    assert adapter_for(CWM).plugin.distribution == "mwtool-cwm"
    runpy.run_path(str(package / "tests" / "test_adapter.py"))["test_the_adapter_describes_the_model"]()
    assert "mwtool adapters check cwm" in (package / project["readme"]).read_text()


def test_a_new_package_for_a_type_that_is_served_says_by_whom(tmp_path: Path) -> None:
    assert f"(mwtool {__version__}) serves llama too" in run("adapters", "new", "llama", str(tmp_path / "llama")).stderr
    assert run("adapters", "new", CWM, str(tmp_path / CWM)).stderr == ""


@pytest.mark.parametrize("name", ["x", "my-Type.v2", "a_b"])
def test_a_new_package_announces_the_type_whatever_its_name(tmp_path: Path, name: str) -> None:
    """A dot in a bare key of pyproject.toml would be a table."""
    assert run("adapters", "new", name, str(tmp_path)).exit_code == 0
    project: dict[str, Any] = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    ((announced, value),) = project["entry-points"]["mwtool.adapters"].items()
    module = value.partition(":")[0].replace(".", "/")
    assert announced == name
    assert (tmp_path / f"{module}.py").is_file()


@pytest.mark.parametrize(
    ("name", "folder"),
    [("a b", "new"), ("../x", "new"), ("x-", "new"), ("9x", "new"), ("cwm", "used"), ("cwm", "file")],
)
def test_a_new_package_overwrites_nothing(tmp_path: Path, name: str, folder: str) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    result = run("adapters", "new", name, str(tmp_path / folder))
    assert isinstance(result.exception, MwtoolError)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "thesis.txt", "used"]


def test_the_example_package_serves_a_type_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration is known to transformers only once mwtool has loaded the plugin: in a process of its own."""
    example = Path(__file__).parents[2] / "docs" / "examples" / "mwtool-pebble"
    project = tomllib.loads((example / "pyproject.toml").read_text())["project"]
    (name, value) = next(iter(project["entry-points"]["mwtool.adapters"].items()))
    info = tmp_path / "site" / "mwtool_pebble-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mwtool-pebble\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[mwtool.adapters]\n{name} = {value}\n")
    path = [str(tmp_path / "site"), str(example), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}

    def python(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    python(str(example / "make_checkpoint.py"), str(tmp_path / "model"))
    document = json.loads(python("-m", "mwtool", "scan", str(tmp_path / "model"), "--json"))
    assert document["model_type"] == name == "pebble"
    assert (document["massive"]["layer"], document["massive"]["indices"][0]) == (1, 17)


def test_cwm_is_still_a_type_without_a_built_in_adapter() -> None:
    assert not {CWM, FLEX} & {*tiny.ALL_TYPES}
    assert AutoConfig.for_model(CWM).model_type == CWM
    assert torch.is_tensor(random_model(tiny_config(CWM)).lm_head.weight)
