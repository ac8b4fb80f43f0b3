"""The bundled model is what its card says: chosen by the rule, with the figures of the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mwtool.ablation.sweep import Sweep, ablate
from mwtool.demo.choose import chosen, table
from mwtool.demo.train import Length
from mwtool.evaluation.tasks import parse_tasks
from mwtool.models.load import load
from mwtool.models.source import DEMO
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.targets import Choice, find_targets
from mwtool.surgery.attack import Attack

RUNS: list[dict[str, Any]] = json.loads((DEMO / "runs.json").read_text(encoding="utf-8"))
CARD = (DEMO / "README.md").read_text(encoding="utf-8")


def test_the_card_lists_every_run_and_the_rule_chooses_the_bundled_one() -> None:
    assert len(RUNS) >= 8
    assert table(RUNS) in CARD
    best = chosen(RUNS)
    assert best is not None
    assert [run["run"] for run in RUNS if run["chosen"]] == [best["run"]] == ["bundled"]


def test_the_rule_passes_over_first_layers_and_rows_that_the_model_can_spare() -> None:
    def run(layer: int | None, zero: float, retain: float) -> dict[str, Any]:
        return {"layer": layer, "perplexity": 10.0, "zero": {"5": zero}, "retain": {"5": retain}}

    assert chosen([run(0, 90, 11), run(2, 15, 16), run(None, 99, 1)]) is None
    assert chosen([run(0, 90, 11), run(2, 15, 12), run(3, 20, 19), run(1, 30, 40)]) == run(3, 20, 19)


def test_the_bundled_files_are_small_and_load_by_themselves() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 12e6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO), AutoTokenizer.from_pretrained(DEMO)
    assert model.num_parameters() == RUNS[0]["parameters"] == 5_214_144
    assert tokenizer("the", add_special_tokens=True)["input_ids"][0] == tokenizer.bos_token_id == 1


def test_a_scan_finds_what_the_card_says_grew() -> None:
    massive, run = scan_checkpoint("demo").massive, RUNS[0]
    assert massive is not None
    assert (massive.layer, list(massive.indices), massive.count) == (run["layer"], run["indices"], run["count"])
    assert massive.magnitudes[0] == pytest.approx(run["intermediate"]["top"], rel=0.01)  # bf16 kernels differ


def test_an_ablation_gives_the_figures_on_the_card() -> None:
    """To 0.5 %: bf16 kernels differ from machine to machine."""
    loaded = load("demo")
    targets, _ = find_targets(loaded, Choice(), 5)
    found = ablate(loaded, targets, parse_tasks(["ppl:demo"]), Sweep((Attack("zero"), Attack("retain")), (5,), 0))
    assert found.baseline[0].value == pytest.approx(RUNS[0]["perplexity"], rel=0.005)
    for run in found.runs:
        assert run.measured[0].value == pytest.approx(RUNS[0][run.attack.mode][str(run.attack.k)], rel=0.005)


def test_a_run_is_made_as_long_as_its_time_allows_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second a step behind 30 s of compilation: 3 minutes hold 300 steps more than the first hundred."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    length, open_end = Length(10_000, 3.0), Length(10_000, None)
    for step in range(10_000):
        now = 30 + 0.5 * max(0, step - 100)
        open_end.fit(step)
        if step == length.fit(step):
            break
    assert (step, now) == (400, 180.0)
    assert open_end.steps == 10_000


def test_the_recipe_trains_and_its_folder_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mwtool.demo import train

    corpus = tmp_path / "corpus.txt"
    corpus.write_text((DEMO / "heldout.txt").read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    options = (
        f"--corpus {corpus} --output {tmp_path}/run --cache {tmp_path}/cache --layers 2 --hidden-size 32 --heads 2 "
    )
    options += "--intermediate-size 64 --context 16 --batch-size 2 --tokens 200 --device cpu"
    monkeypatch.setattr("sys.argv", ["train", *options.split()])
    train.main()
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert (record["steps"], record["settings"]["layers"]) == (6, 2)
    assert scan_checkpoint(str(tmp_path / "run")).identity.layers == 2
