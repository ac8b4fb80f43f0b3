"""`mwtool ablate` as a user meets it: options in, document, table, figure and checkpoint out."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run
from forks import forked
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer import BadParameter
from words import LAYERS, planted_folder, with_tokenizer

from mwtool.cli.options import numbers
from mwtool.files.document import text_of
from mwtool.scan.document import scan_document
from mwtool.scan.scanner import scan_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model"))


def ablate(folder: Path, *arguments: object) -> Any:
    return run("ablate", folder, "--task", f"ppl:{folder / 'text.txt'}", "--window", 16, *arguments)


def test_the_document_has_the_baseline_every_run_and_the_ratios(folder: Path, tmp_path: Path) -> None:
    ran = ablate(
        folder, "--mode", "zero", "--mode", "scale:0.5", "-k", "0,2", "--draws", 2, "--json", "-o", tmp_path / "a.json"
    )
    document = ran.document
    assert ran.code == 0
    assert document == json.loads((tmp_path / "a.json").read_text())
    assert document["schema"] == "mwtool.ablate/1"
    (task,) = document["baseline"]
    controls = [None, "random:0", "random:1", "norm"]
    found = [(one["mode"], one["k"], one["control"]) for one in document["runs"]]
    expected = [
        (mode, k, control) for mode in ("zero", "scale:0.5") for k in (0, 2) for control in controls[: 1 + 3 * (k > 0)]
    ]
    assert found == expected
    for one in document["runs"]:
        assert one["ratio"][task] == pytest.approx(one["results"][task] / document["baseline"][task], rel=1e-9)
        assert (one["layer"], one["expert"], len(one["indices"])) == (1, None, one["k"])
        low, high = one["interval"][task]
        assert low <= one["ratio"][task] <= high
    assert document["runs"][0]["results"] == document["baseline"]
    assert document["runs"][1]["indices"][0] == 17


def test_what_is_noted_on_stderr_is_in_the_document(folder: Path, tmp_path: Path) -> None:
    """Of loading, of the saved scan, of the text and of the sweep, in this order."""
    scanned = {**scan_document(scan_checkpoint(str(folder))), "model": "another"}
    (tmp_path / "scan.json").write_text(text_of(scanned))
    ran = ablate(folder, "-k", "60", "--indices", ",".join(map(str, range(60))), "--mode", "zero", "--massive",
                 tmp_path / "scan.json", "--revision", "main", "--window", "99", "--json")  # fmt: skip
    assert ran.err.splitlines() == [f"note: {note}" for note in ran.document["notes"]]
    expected = ("--revision main is ignored", "was made with another", "shortened to the 64", "too few rows")
    assert all(words in note for words, note in zip(expected, ran.document["notes"], strict=True))


def test_the_table_has_a_line_an_attack_and_the_verdict_below_it(folder: Path) -> None:
    ran = ablate(folder, "-k", "0,1", "--draws", 2, "--generate", "w1 w2")
    assert ran.code == 0
    lines = [line.split() for line in ran.out.splitlines()]
    assert [line[:2] for line in lines if line and line[0] in ("none", "zero", "retain")] == [
        ["none", "0"], ["zero", "0"], ["zero", "1"], ["retain", "0"], ["retain", "1"]
    ]  # fmt: skip
    assert "zeroing 1 row multiplies" in " ".join(ran.out.split())
    assert "original" in ran.out
    assert "rows of model.layers.1.mlp (layer 1), ranked: 17" in ran.out


def test_continuations_stand_side_by_side(folder: Path) -> None:
    out = ablate(folder, "-k", "1", "--no-controls", "--generate", "w1 w2").out
    assert any(all(name in line for name in ("original", "zero:1", "retain:1")) for line in out.splitlines())


def test_each_layer_is_one_line_without_controls(folder: Path) -> None:
    document = ablate(folder, "--each-layer", "--mode", "zero", "-k", "1", "--json").document
    assert [(one["layer"], one["control"]) for one in document["runs"]] == [(layer, None) for layer in range(LAYERS)]


@pytest.mark.parametrize("suffix", ["png", "SVG", "pdf"])
def test_the_curve_is_drawn_in_the_format_its_name_says(folder: Path, tmp_path: Path, suffix: str) -> None:
    figure = tmp_path / f"curve.{suffix}"
    assert ablate(folder, "-k", "0,1,3", "--draws", 2, "--plot", figure).code == 0
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert figure.read_bytes().startswith(starts[suffix.lower()])


def test_a_text_may_have_any_name(folder: Path, tmp_path: Path) -> None:
    """Brackets are Rich's markup and dollar signs matplotlib's, but here they are a file's."""
    name = "a[b]$x_{2$.txt"
    (tmp_path / name).write_text((folder / "text.txt").read_text())
    options = ("-k", "1", "--no-controls", "--plot", tmp_path / "curve.svg")
    ran = run("ablate", folder, "--task", f"ppl:{tmp_path / name}", *options)
    assert ran.code == 0
    assert f"ppl:{name}  ratio" in ran.out
    assert f"<!-- ppl:{name} -->" in (tmp_path / "curve.svg").read_text()


def test_the_saved_model_has_the_perplexity_that_was_measured(folder: Path, tmp_path: Path) -> None:
    ran = ablate(folder, "--mode", "zero", "-k", "2", "--no-controls", "--save", tmp_path / "saved", "--json")
    document = ran.document
    again = run("ablate", tmp_path / "saved", "--task", f"ppl:{folder / 'text.txt'}", "--window", 16, "--layer", 1, "--indices", "0", "--mode", "zero", "-k", "0", "--json").document  # fmt: skip # noqa: E501 - one command line
    assert list(again["baseline"].values()) == list(document["runs"][0]["results"].values())
    assert document["saved"] == str(tmp_path / "saved")
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").model.layers[1].mlp.up_proj.weight
    assert not weight[document["runs"][0]["indices"]].any()


def test_a_saved_scan_gives_what_scanning_gives_and_other_shapes_are_refused(folder: Path, tmp_path: Path) -> None:
    scanned = scan_document(scan_checkpoint(str(folder)))
    (tmp_path / "scan.json").write_text(text_of(scanned))
    options = ("--mode", "zero", "-k", "3", "--draws", 1, "--json")
    with_file, without = (
        ablate(folder, *options, *more).document for more in (["--massive", tmp_path / "scan.json"], [])
    )
    assert with_file["runs"] == without["runs"]
    assert "ranks 5 rows: scan with -k 6" in ablate(folder, "-k", "6", "--massive", tmp_path / "scan.json").fault
    scanned["shape"]["layers"] = 7
    (tmp_path / "scan.json").write_text(text_of(scanned))
    assert "was made with layers 7" in ablate(folder, "--massive", tmp_path / "scan.json").fault
    (tmp_path / "scan.json").write_text("{}")
    assert "has schema None; expected 'mwtool.scan/2'" in ablate(folder, "--massive", tmp_path / "scan.json").fault


def test_the_document_of_an_ablation_gives_the_rows_it_attacked(folder: Path, tmp_path: Path) -> None:
    first = tmp_path / "ablation.json"
    options = ("--mode", "zero", "-k", "2", "--draws", 1, "--json")
    made = ablate(folder, *options, "-o", first).document
    again = ablate(folder, *options, "--massive", first).document
    assert again["runs"] == made["runs"]
    assert again["massive"] == made["massive"]
    assert made["massive"]["indices"][:2] == made["runs"][0]["indices"]
    assert ablate(folder, *options, "--layer", 3, "--indices", "4,7", "-o", first).document["massive"] is None
    assert "an ablation of rows named by hand" in ablate(folder, "--massive", first).fault


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--indices", "64"], "row 64 does not exist"),
        (["--layer", "4"], "layer 4 does not exist; the model has layers 0 to 3"),
        (["--mode", "drop"], "unknown mode 'drop'; expected zero, retain, mean or scale:X"),
        (["--mode", "scale:nan"], "unknown mode 'scale:nan'"),
        (["-k", "99"], "k is 99"),
        (["--task", "pl:x"], "did you mean ppl:x?"),
        (["--plot", "curve.doc"], "matplotlib cannot write files of type .doc; expected one of"),
        (["--massive", "absent.json"], "absent.json"),
        (["--generate", "w1 " * 64], "the prompt has 65 tokens with bos and the model 64 positions"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_1(folder: Path, arguments: list[str], message: str) -> None:
    assert message in ablate(folder, *arguments).fault


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_one_line_and_exit_1(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.txt").write_text(text)
    assert "empty.txt is empty" in run("ablate", folder, "--task", f"ppl:{tmp_path / 'empty.txt'}").fault


def test_a_text_shorter_than_a_window_is_measured_and_said_to_be(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    ran = run("ablate", folder, "--task", f"ppl:{tmp_path / 'short.txt'}", "-k", "1", "--json")
    assert "evaluated as one short window" in ran.err
    assert ran.document["runs"][0]["interval"] == {f"ppl:{tmp_path / 'short.txt'}": None}


def test_a_model_without_massive_weights_offers_indices(tmp_path: Path) -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    for parameter in model.parameters():
        parameter.data.mul_(0.1)
    folder = with_tokenizer(tmp_path, model)
    assert "has no massive weights; name rows yourself with --layer N --indices I,J" in ablate(folder).fault
    assert ablate(folder, "--layer", 1, "--indices", "3,4", "--draws", 1).code == 0


def test_non_finite_results_are_null_in_the_document_and_said_in_the_table(folder: Path) -> None:
    options = ("--mode", "scale:1e38", "-k", "1", "--draws", 1)
    (task,) = (document := ablate(folder, *options, "--json").document)["baseline"]
    assert document["runs"][0]["results"][task] is None
    assert "finite" in document["runs"][0]["nonfinite"][task]
    said = " ".join(ablate(folder, *options).out.split())
    assert "not finite" in said
    assert "ppl:text.txt is not finite scale:1e+38:1 in layer 1: 7 of 7 samples have no finite loss" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "has no tensor for model.layers.3.mlp.up_proj.weight"),
        (torch.zeros(63, 32), "has shape (63, 32); config.json makes it (64, 32)"),
        (torch.full((64, 32), torch.nan), "tensor model.layers.3.mlp.up_proj.weight holds NaN or inf"),
    ],
    ids=["absent", "misshapen", "not finite"],
)
def test_a_damaged_checkpoint_is_one_line_naming_the_tensor(
    folder: Path, tmp_path: Path, change: torch.Tensor | None, message: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    if change is not None:
        tensors["model.layers.3.mlp.up_proj.weight"] = change
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert message in ablate(tmp_path / "model", "-k", "1").fault


@pytest.mark.parametrize("options", [["--mode", "zero"], ["--mode", "mean"], ["--generate", "w39"]], ids=str)
def test_a_tokenizer_of_another_model_is_told_by_the_token(folder: Path, tmp_path: Path, options: list[str]) -> None:
    made = with_tokenizer(tmp_path, tiny.model("llama", num_hidden_layers=2, vocab_size=20))
    ran = ablate(made, "--layer", 1, "--indices", 3, "-k", "1", "--no-controls", *options)
    assert "the tokenizer gives token id 42, outside the vocabulary of 20" in ran.fault


@pytest.mark.parametrize(
    "arguments",
    [
        ["-k", "1,x"], ["-k", ""], ["-k", "-1"], ["-k", "1,1"], ["-k", "1.5"], ["--indices", "a"], ["--expert", "1"],
        ["--each-layer", "--layer", "1"], ["--save", "out"], ["--massive", "f", "--layer", "1"], ["--draws", "0"],
        ["--each-layer", "--generate", "w1"], ["--device-map", "cuda"], ["--seed", str(2**32)],
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_2(folder: Path, arguments: list[str]) -> None:
    ran = ablate(folder, *arguments)
    assert (ran.code, ran.out) == (2, "")


def test_a_full_disk_leaves_the_former_figure(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "curve.png").write_text("former")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))  # the figure is larger
    try:
        fault = ablate(folder, "-k", "1", "--no-controls", "--plot", tmp_path / "curve.png", "--json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "curve.png could not be written: File too large; no partial file is left" in fault.err
    assert fault.code == 1
    assert fault.document["runs"]  # what was measured is not lost with it
    assert (tmp_path / "curve.png").read_text() == "former"
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_a_full_disk_while_saving_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the weights are larger
    try:
        ran = ablate(folder, "--mode", "zero", "-k", "1", "--no-controls", "--save", tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "saved could not be written: File too large; no partial folder is left" in ran.err
    assert ran.code == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_with_130(folder: Path, tmp_path: Path) -> None:
    """Sent once the sweep has begun, which its notes on stderr show."""
    (tmp_path / "long.txt").write_text("w1 w2 w3 " * 20_000)
    process = forked("ablate", folder, "--task", f"ppl:{tmp_path / 'long.txt'}", "--window", 16, "--revision", "noted")
    while "--revision noted is ignored" not in (line := process.err.readline()):
        assert line, "it ended before"
    process.signal(signal.SIGINT)
    status, out, _ = process.end()
    assert (status, out) == (130, "")


@given(st.lists(st.integers(0, 10**6), min_size=1, unique=True))
def test_a_list_of_numbers_is_read_as_it_is_printed(values: list[int]) -> None:
    assert numbers(",".join(map(str, values)), "-k") == tuple(values)
    assert numbers(" , ".join(map(str, values)), "-k") == tuple(values)


@given(st.text(max_size=10))
def test_any_text_is_a_list_of_distinct_numbers_or_wrong_usage(text: str) -> None:
    try:
        values = numbers(text, "-k")
    except BadParameter:
        return
    assert values
    assert len(set(values)) == len(values)
    assert all(value >= 0 for value in values)


def test_the_device_of_every_layer_may_be_left_to_accelerate(folder: Path) -> None:
    document = ablate(folder, "--mode", "zero", "-k", "1", "--no-controls", "--device-map", "auto", "--json").document
    assert document["runs"][0]["indices"] == [17]
    assert torch.tensor(list(document["baseline"].values())).isfinite().all()


def keys(value: Any) -> set[str]:
    """Every key at every depth, but for names of tasks."""
    if isinstance(value, list):
        return set().union(*map(keys, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    return {key for key in value if ":" not in key}.union(*map(keys, value.values()))


def test_every_key_of_the_document_is_described(folder: Path) -> None:
    document = ablate(folder, "-k", "1", "--draws", 1, "--generate", "w1", "--json").document
    page = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    assert keys(document) - set(re.findall(r"`([a-z_0-9]+)`", page)) == set()


@pytest.mark.parametrize("on", ["base", "merged"])
def test_an_adapter_is_recorded_with_where_its_rows_were_taken_out(folder: Path, tmp_path: Path, on: str) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["up_proj"], use_dora=True))
    wrapped.save_pretrained(tmp_path / "adapter")
    task = ("--task", f"ppl:{folder / 'text.txt'}", "--window", 16, "--mode", "retain", "-k", "1", "--draws", 1)
    document = run("ablate", tmp_path / "adapter", *task, "--on", on, "--json").document
    assert (document["on"], document["adapter"], document["model"]) == (on, str(tmp_path / "adapter"), str(folder))
    assert document["runs"][0]["indices"] == [17]
    assert document["runs"][0]["nonfinite"] == {}  # DoRA rows without norm


def test_options_come_from_a_file_and_flags_win(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mode: [zero, mean]\nk: 1,2\ncontrols: false\n")
    found = ablate(folder, "--config", tmp_path / "run.yaml", "-k", "2", "--json").document["runs"]
    assert [(one["mode"], one["k"], one["control"]) for one in found] == [("zero", 2, None), ("mean", 2, None)]
