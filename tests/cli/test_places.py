"""`--event`, `--layer`, `--expert`, `--indices` and `--massive` of ablate, eval and finetune, as a user meets them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import Ran, run
from finetuning import finetune, weights
from safetensors.torch import load_file
from words import planted_folder, with_tokenizer

from mwtool.finetune import trainer
from mwtool.macdrop.callback import MacDropCallback

Command = Callable[..., Ran]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dimension 5 written at layer 1, erased at 3, written far larger at 5: events 0, 1 and 2."""
    model = tiny.quiet(tiny.model("llama"))
    for layer, value in ((1, 300.0), (3, -280.0), (5, 20000.0)):
        tiny.write(model, layer, 10 + layer, {5: value}, z=100.0 * layer)
    return with_tokenizer(tmp_path_factory.mktemp("model"), model)


@pytest.fixture(scope="module")
def scan(folder: Path) -> Path:
    path = folder.parent / "scan.json"
    document = run("scan", folder, "-o", path, "--json").document
    assert [(event["layer"], event["kind"]) for event in document["events"]] == [(1, "up"), (3, "down"), (5, "up")]
    return path


def ablate(folder: Path, *more: object) -> Ran:
    options = ("--window", 16, "--mode", "zero", "-k", 2, "--no-controls")
    return run("ablate", folder, "--task", f"ppl:{folder / 'text.txt'}", *options, *more)


def evaluate(folder: Path, *more: object) -> Ran:
    return run("eval", folder, "--task", f"ppl:{folder / 'text.txt'}", "--window", 16, "--attack", "zero:2", *more)


def train(folder: Path, *more: object) -> Ran:
    return finetune(folder, "--dry-run", "--target-modules", "q_proj", "-k", 2, *more)


COMMANDS = [pytest.param(command, id=command.__name__) for command in (ablate, evaluate, train)]


def places(document: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """Layers and rows, as far as all three commands record them: ablate the rows attacked, the others those ranked."""
    found = document["runs"][0]["places"] if "runs" in document else document["places"]
    found = found.get("", [document["massive"]]) if isinstance(found, dict) else found
    return [(one["layer"], one["indices"][:2]) for one in found]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), [(5, 15)]),
        (("--event", "0,2"), [(1, 11), (5, 15)]),
        (("--event", "down"), [(3, 13)]),
    ],
)
def test_events_are_those_of_the_model_and_of_its_saved_scan(
    folder: Path, scan: Path, command: Command, arguments: tuple[object, ...], expected: list[tuple[int, int]]
) -> None:
    fresh, read = (command(folder, *arguments, *more, "--json").document for more in ((), ("--massive", scan)))
    assert places(fresh) == places(read)
    assert [(layer, rows[0]) for layer, rows in places(read)] == expected


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--layer", 2), [2]),
        (("--layer", "1,2"), [1, 2]),
        (("--layer", 2, "--indices", "3,9"), [(2, [3, 9])]),
        (("--event", 0, "--indices", "3,9"), [(1, [3, 9])]),
        (("--indices", "3,9"), [(5, [3, 9])]),
    ],
)
def test_layers_and_rows_are_those_named(
    folder: Path, command: Command, arguments: tuple[object, ...], expected: list[Any]
) -> None:
    found = places(command(folder, *arguments, "--json").document)
    assert [one if isinstance(want, tuple) else one[0] for one, want in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_an_expert_is_the_one_named(tmp_path: Path, command: Command) -> None:
    folder = planted_folder(tmp_path, "mixtral", num_hidden_layers=4)
    arguments = ("--layer", 2, "--expert", 3, "--indices", "5,2", "--json")
    document = command(folder, *arguments).document
    assert places(document) == [(2, [5, 2])]
    found = document["runs"][0]["places"] if "runs" in document else document["places"]
    assert [one["expert"] for one in (found[""] if isinstance(found, dict) else found)] == [3]
    fault = command(folder, "--layer", 2, "--expert", 9, "--indices", "5,2").fault
    assert "there is no expert 9" in fault


@pytest.mark.parametrize("command", COMMANDS)
def test_the_events_of_an_ablation_are_read_from_its_document(
    folder: Path, scan: Path, tmp_path: Path, command: Command
) -> None:
    """One that scanned, and one that read a scan; by their numbers there."""
    for number, more in enumerate(((), ("--massive", scan))):
        ablation = tmp_path / f"{number}.json"
        assert ablate(folder, "--event", "0,2", *more, "-o", ablation).code == 0
        for events, expected in (("all", [(1, 11), (5, 15)]), ("2", [(5, 15)])):
            found = places(command(folder, "--massive", ablation, "--event", events, "--json").document)
            assert [(layer, rows[0]) for layer, rows in found] == expected
        assert "is an ablation of events 0, 2 together; add --event all" in command(folder, "--massive", ablation).fault
        fault = command(folder, "--massive", ablation, "--event", 1).fault
        assert fault == f"there is no event 1; {ablation} has events 0, 2"
        fault = command(folder, "--massive", ablation, "--event", "down").fault
        assert fault == f"--event down: {ablation} has no such event; name a --layer"


def test_an_ablation_of_the_massive_rows_has_their_event(folder: Path, scan: Path, tmp_path: Path) -> None:
    for more in ((), ("--massive", scan)):
        document = ablate(folder, *more, "--json").document
        assert [(one["event"], one["kind"]) for one in document["events"]] == [(2, "up")]
        assert document["events"][0]["rows"] == document["massive"]
    assert ablate(folder, "--indices", "3,9", "--json").document["events"] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_document_does_not_have_is_one_line(folder: Path, scan: Path, tmp_path: Path, command: Command) -> None:
    assert command(folder, "--massive", scan, "--event", 3).fault == f"there is no event 3; {scan} has events 0 to 2"
    by_hand = tmp_path / "hand.json"
    assert ablate(folder, "--layer", 2, "-o", by_hand).code == 0
    assert "hand.json has no events; expected" in command(folder, "--massive", by_hand, "--event", "all").fault
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(scan.read_text()), "model_type": "mistral"}))
    assert "was made with model_type mistral" in command(folder, "--massive", other, "--event", 0).fault
    damaged = json.loads(scan.read_text())
    damaged["events"][0]["rows"]["layer"] = 99
    other.write_text(json.dumps(damaged))
    assert "layer 99 of 8" in command(folder, "--massive", other, "--event", 0).fault


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--event", 3), "there is no event 3; the scan of "),
        (("--layer", 8), "layer 8 does not exist; the model has layers 0 to 7"),
        (("--layer", "1,8"), "layer 8 does not exist"),
        (("--indices", "64,1"), "row 64 does not exist"),
        (("--layer", 1, "--expert", 0, "--indices", "1,2"), "layer 1 has one dense"),
    ],
)
def test_places_that_do_not_exist_are_one_line(
    folder: Path, command: Command, arguments: tuple[object, ...], message: str
) -> None:
    assert message in command(folder, *arguments).fault


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("--event", 0, "--layer", 1),
        ("--event", "some"),
        ("--event", "all", "--indices", "1,2"),
        ("--layer", "1,2", "--expert", 0),
        ("--expert", 0),
        ("--layer", 1, "--massive", "scan.json"),
    ],
)
def test_choices_that_exclude_each_other_are_wrong_usage(
    folder: Path, command: Command, arguments: tuple[object, ...]
) -> None:
    ran = command(folder, *arguments)
    assert (ran.code, ran.out) == (2, "")


def test_a_model_saved_under_a_joint_attack_has_the_perplexity_that_was_measured(folder: Path, tmp_path: Path) -> None:
    made = ablate(folder, "--event", "all", "--save", tmp_path / "saved", "--json").document
    again = run("eval", tmp_path / "saved", "--task", f"ppl:{folder / 'text.txt'}", "--window", 16, "--json").document
    assert [again["results"][0]["value"]] == list(made["runs"][0]["results"].values())
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "saved"))
    attacked = {(one["layer"], row) for one in made["runs"][0]["places"] for row in one["indices"]}
    changed = set()
    for name, tensor in before.items():
        for row in (tensor != after[name]).reshape(len(tensor), -1).any(1).nonzero().flatten().tolist():
            assert name.endswith(("mlp.up_proj.weight", "mlp.gate_proj.weight"))
            assert not after[name][row].any()
            changed.add((int(name.split(".")[2]), row))
    assert changed == attacked
    kept = json.loads((tmp_path / "saved" / "mwtool.json").read_text())
    assert [(one["module"], one["indices"]) for one in kept["places"]] == [
        (one["module"], one["indices"]) for one in made["runs"][0]["places"]
    ]


@pytest.mark.parametrize("way", ["event", "curriculum"])
def test_a_run_on_several_layers_trains_restores_records_and_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Whole, and interrupted in step 3; the base weights end as those of the checkpoint, bit for bit."""
    models = []
    original = trainer.with_adapter

    def with_adapter(*arguments: Any) -> Any:
        models.append(original(*arguments))
        return models[-1]

    monkeypatch.setattr(trainer, "with_adapter", with_adapter)
    (tmp_path / "c.yaml").write_text("layers: [1, 3, 5]\nk: 2\nschedule: step:0.8\n")
    where = ("--event", "all", "-k", 2) if way == "event" else ("--macdrop", tmp_path / "c.yaml")
    options = ("--max-steps", 4, "--save-steps", 1, "--eval-share", 0, *where)
    document = finetune(folder, *options, "-o", tmp_path / "whole", "--json").document
    assert [(one["layer"], one["indices"][0]) for one in document["places"]] == [(1, 11), (3, 13), (5, 15)]
    assert document["massive"] == document["places"][0]
    assert len(document["p"]) == 4
    card = (tmp_path / "whole" / "README.md").read_text()
    assert all(f"`{one['module']}`" in card for one in document["places"])
    trained = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)
    base = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): tensor
        for name, tensor in models[0].state_dict().items()
        if "lora" not in name
    }
    assert all(torch.equal(base[name], tensor) for name, tensor in load_file(folder / "model.safetensors").items())

    with monkeypatch.context() as patch:
        patch.setattr(MacDropCallback, "on_step_begin", interrupting(MacDropCallback.on_step_begin, step=3))
        ran = finetune(folder, *options, "-o", tmp_path / "cut")
    assert (ran.code, "stopped after step 3 of 4" in ran.err) == (130, True)
    again = finetune(folder, *options, "-o", tmp_path / "cut", "--resume", "--json")
    assert "resuming from" in again.err
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert (again.document["places"], again.document["p"]) == (document["places"], document["p"])


def interrupting(begin: Any, step: int) -> Any:
    """The callback, with Ctrl-C as this step begins, when the rows are dropped from."""

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        if state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step_begin


def test_a_run_on_one_layer_does_not_go_on_from_one_on_several(folder: Path, tmp_path: Path) -> None:
    options = ("--max-steps", 1, "--eval-share", 0, "-k", 2, "-o", tmp_path / "out")
    assert finetune(folder, *options, "--event", "all").code == 0
    (tmp_path / "out" / "macdrop.json").unlink()
    assert "was made with rows [[" in finetune(folder, *options, "--resume").fault
