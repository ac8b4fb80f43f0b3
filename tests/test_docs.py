"""What the documentation says exists, and what exists is in the documentation."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from command import run
from documented import WIDTH, blocks, words
from notebook import cells_of, outputs_of
from packaging.requirements import Requirement
from typer.main import get_command

import mwtool
from mwtool.cli import app
from mwtool.layout import UnsupportedModel
from mwtool.models.source import DEMO
from mwtool.scan.document import scan_document

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "mwtool" / "demo" / "README.md", *sorted(DOCS.glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


RUN = ("quickstart", "report", "scan", "states", "compare", "adapters-command")
"""Pages whose commands are run."""


def keys(value: Any) -> Iterator[str]:
    """Every key of a document, at every depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_every_key_of_a_scan_document_is_described(model_type: str) -> None:
    model = tiny.model(model_type)
    tiny.plant(model)
    model.config.name_or_path = "Mixtral-8x7B-v0.1"  # of the paper's table, so that `published` is there
    document = scan_document(mwtool.scan_model(model))
    described = set(re.findall(r"`([a-z_0-9]+)`", (ROOT / "docs" / "json.md").read_text(encoding="utf-8")))
    assert document["published"] is not None
    assert set(keys(document)) - described == set()


@pytest.mark.parametrize("command", [["adapters"], ["adapters", "check", "llama"]])
def test_every_key_of_the_adapters_documents_is_described(command: list[str]) -> None:
    document = run(*command, "--json").document
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([a-z_0-9]+)`", page.partition("## `mwtool.adapters/1`")[2]))
    assert set(keys(document)) - described == {"schema", "mwtool_version"}
    assert f"`{document['schema']}`" in page


@pytest.mark.parametrize("file", ["model.py", "adapter.py"])
def test_the_tutorials_code_is_the_examples(file: str) -> None:
    """Whoever copies it from the page has the package that CI installs."""
    tutorial = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    shown = tutorial.partition(f"`mwtool-pebble/mwtool_pebble/{file}`:\n\n```python\n")[2].partition("```\n")[0]
    assert shown == (ROOT / "docs/examples/mwtool-pebble/mwtool_pebble" / file).read_text(encoding="utf-8")


def test_every_folder_has_its_line_in_the_readme() -> None:
    tree = README.partition("## Files")[2].partition("```\n\n")[0]
    listed = set(re.findall(r"^  (\w+/) ", tree, flags=re.MULTILINE))
    folders = {f"{path.parent.name}/" for path in (ROOT / "mwtool").glob("*/__init__.py")}
    assert folders - listed == set()


def python_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if python_of(page) and page.name != "adapters.md"],  # the next test's
    ids=lambda page: f"{page.parent.name}/{page.name}",
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")  # TRL's calls
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # Trainer's, without a GPU
def test_python_in_the_documentation_runs_as_it_stands(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the bundled model, in the place of a path that everybody replaces."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType(page.stem)
    monkeypatch.setitem(sys.modules, page.stem, module)  # where dataclasses look up their annotations
    names = module.__dict__
    for code in python_of(page):
        exec(compile(code.replace("path/to/model", str(DEMO)), page.name, "exec"), names)


def test_python_in_the_adapters_tutorial_is_the_example_s_or_runs() -> None:
    """The first two blocks are compared with the example's files above; the third refuses a model."""
    _, _, refusal, options = python_of(DOCS / "adapters.md")
    with pytest.raises(UnsupportedModel, match="normalizes the intermediate state"):
        exec(compile(refusal, "adapters.md", "exec"), {})
    exec(compile(options, "adapters.md", "exec"), {})


def test_the_notebook_runs_and_shows_what_it_holds() -> None:
    """Word for word, and a picture where there is one; numbers and drawings differ between machines."""

    def told(outputs: list[dict[str, Any]]) -> list[tuple[list[str], list[str]]]:
        found = [(sorted(one.get("data", ())), one.get("text") or one["data"]["text/plain"]) for one in outputs]
        return [(kinds, words("".join(text))) for kinds, text in found]

    path = DOCS / "notebook.ipynb"
    for cell, outputs in zip(cells_of(path), outputs_of(path), strict=True):
        assert told(outputs) == told(cell["outputs"]), "".join(cell["source"])


@pytest.mark.parametrize(
    "name", ["quickstart.md", "report.md", "scan.md", "states.md", "compare.md", "adapters-command.md"]
)
def test_commands_in_the_documentation_run_and_print_what_is_shown(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word; numbers and drawings differ between machines, and a few windows take the place of all.

    Models of the Hub are left out.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    ran = 0
    for block in blocks(DOCS / name):
        printed = ""
        for command in block.commands:
            if "HuggingFaceTB/" in command:
                break
            if command.startswith("mwtool "):
                arguments = shlex.split(command)[1:]
                few = () if arguments[0] not in ("ablate", "eval") or "--limit" in arguments else ("--limit", 10)
                done = run(*arguments, *few)
                assert done.code == 0, f"{command}\n{done.err}"
                printed += done.out
            else:
                subprocess.run(["bash", "-c", command.replace("python ", f"{sys.executable} ", 1)], check=True)
            ran += 1
        else:
            assert block.output is None or words(block.output) == words(printed)
    assert ran or name == "scan.md"


def test_every_benchmark_is_documented_with_options_that_it_has() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests/benchmarks").glob("*.py")}
    named = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for script, options in re.findall(r"tests/benchmarks/(\w+\.py)([^`|\n)]*)", text):
            named.add(script)
            for option in re.findall(r"--[a-z][a-z-]*", options):
                assert f'"{option}"' in scripts[script], f"{page.name}: {script} {option}"
    assert named == set(scripts)


def test_every_command_is_in_the_readme() -> None:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined] # Typer gives a group
    assert [name for name in commands if f"`mwtool {name}" not in README] == []


def test_the_pinned_versions_satisfy_what_the_project_requires() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in ("test", "dev", "docs", "eval") for line in project["optional-dependencies"][extra]]
    required = [Requirement(line) for line in (*project["dependencies"], *extras) if not line.startswith("mwtool")]
    pinned = {one.name: pins[one.name.lower().replace("_", "-")] for one in required}
    assert [str(one) for one in required if not one.specifier.contains(pinned[one.name])] == []


def test_pre_commit_has_the_pinned_versions() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    used = re.findall(r"additional_dependencies: \[(.+)\]", hooks)
    assert used
    assert set(used) - set(pins) == set()
