"""What `--dry-run` tells of eval, ablate and quantize-check, held against what then runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run

from mwtool.ablation.forecast import forecast_sweep
from mwtool.ablation.sweep import Sweep, ablate
from mwtool.evaluation.config import EvalConfig, Options
from mwtool.evaluation.evaluate import evaluate
from mwtool.evaluation.forecast import Forecast
from mwtool.evaluation.forecast_models import forecast_models
from mwtool.evaluation.prefix_reuse import Variant
from mwtool.evaluation.tasks import parse_tasks
from mwtool.evaluation.trial import Part, States, seconds_of
from mwtool.models.load import Loaded, load
from mwtool.models.peak_memory import peak_of
from mwtool.quantization.check import quantize_check
from mwtool.quantization.config import QuantizeConfig
from mwtool.quantization.forecast import forecast_check
from mwtool.scan.loaded import scan_loaded
from mwtool.scan.settings import Choice, Settings
from mwtool.scan.targets import find_targets
from mwtool.surgery.attack import Attack, parse_mode

CPU = {torch.device("cpu")}
OPTIONS = Options(window=64, limit=5, batch_size=2)
WITHIN = 0.15
"""How far the memory told may be from that measured: a batch is tried in a few states and not in all."""


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load("demo")


@contextmanager
def batches_counted(loaded: Loaded) -> Iterator[list[int]]:
    """Tokens of every forward through the last layer but those of the trials of a few tokens."""
    seen: list[int] = []

    def count(_module: Any, args: Any, _output: Any) -> None:
        if args[0].shape[:2].numel() > 16:
            seen.append(args[0].shape[:2].numel())

    handle = loaded.base.get_submodule(loaded.layers[-1].path).register_forward_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


def held_against(told: Forecast, loaded: Loaded, measure: Any) -> None:
    """Forwards are told exactly, memory nearly: every tensor of the whole measurement is counted, not of one batch."""
    with batches_counted(loaded) as seen:
        most = peak_of(measure, CPU)
    assert len(seen) == told.forwards
    assert told.batch == pytest.approx(most, rel=WITHIN)


def test_the_counter_of_live_tensors_gives_what_is_worked_out_by_hand() -> None:
    a = torch.ones(1000, 1000)  # 4 MB, before the block

    def work() -> torch.Tensor:
        x = a @ a  # 4
        y = x + 1  # 8
        del x  # 4
        a.add_(0)  # in place: none
        z = y[:10] * 2  # 4.04
        return z.clone()  # 4.08

    assert peak_of(work, CPU) == 8_000_000
    assert peak_of(lambda: a.T, CPU) == 0


def test_a_sweep_runs_the_forwards_that_were_told_and_takes_about_the_memory(demo: Loaded) -> None:
    sweep = Sweep((parse_mode("zero"), parse_mode("retain")), (1, 3), draws=2)
    groups, _ = find_targets(demo, Choice(), 3)
    tasks = parse_tasks(["ppl:demo"])
    told = forecast_sweep(demo, groups, tasks, sweep, OPTIONS)
    found: list[Any] = []
    held_against(told, demo, lambda: found.append(ablate(demo, groups, tasks, sweep, OPTIONS)))
    assert told.states["attacks"] + told.states["controls"] == len(found[0].measurements.found) - 1


def test_layers_in_turn_run_the_forwards_that_were_told_and_keep_the_streams_between_them(demo: Loaded) -> None:
    groups, _ = find_targets(demo, Choice(each_layer=True), 1)
    sweep, tasks = Sweep((parse_mode("zero"),), (1,), draws=0), parse_tasks(["ppl:demo"])
    told = forecast_sweep(demo, groups, tasks, sweep, OPTIONS)
    assert told.states == {"unchanged": 1, "attacks": len(groups), "controls": 0}
    held_against(told, demo, lambda: ablate(demo, groups, tasks, sweep, OPTIONS))


def test_an_evaluation_runs_the_forwards_that_were_told_and_takes_about_the_memory(demo: Loaded) -> None:
    config = EvalConfig(tasks=("ppl:demo", "mc:demo", "cloze:demo"), attacks=("none", "zero:1"), measuring=OPTIONS)
    (told,) = forecast_models(["demo"], config, compare=False, on_note=lambda _: None)
    scan = scan_loaded(demo, Settings(k=1))
    attacks, tasks = (Attack(), parse_mode("zero").at(1)), parse_tasks(config.tasks)
    held_against(told, demo, lambda: evaluate(demo, scan.massive, attacks, tasks, OPTIONS))


def test_a_check_of_quantizing_runs_the_forwards_that_were_told_and_takes_about_the_memory(demo: Loaded) -> None:
    scan, plan, tasks = (
        scan_loaded(demo, Settings(k=2)),
        QuantizeConfig(bits=(4,), ks=(1, 2)),
        parse_tasks(["ppl:demo"]),
    )
    told = forecast_check(demo, scan, tasks, plan, OPTIONS)
    with batches_counted(demo) as seen:
        most = peak_of(lambda: quantize_check(demo, scan, tasks, plan, OPTIONS), CPU)
    assert len(seen) == told.forwards
    assert told.held + (told.batch or 0) == pytest.approx(most, rel=WITHIN)


def test_a_mean_is_told_with_the_windows_it_is_taken_over(demo: Loaded) -> None:
    groups, _ = find_targets(demo, Choice(), 1)
    sweep = Sweep((parse_mode("zero"),), (1,), draws=0)
    tasks = parse_tasks(["ppl:demo"])
    without = forecast_sweep(demo, groups, tasks, sweep, OPTIONS).forwards or 0
    assert (
        forecast_sweep(demo, groups, tasks, replace(sweep, modes=(parse_mode("mean"),)), OPTIONS).forwards
        == without + 5
    )


def test_weights_are_told_as_the_file_holds_them(demo: Loaded) -> None:
    config = EvalConfig(measuring=OPTIONS)
    (told,) = forecast_models(["demo"], config, compare=False, on_note=lambda _: None)
    assert told.read == pytest.approx(told.weights, rel=0.01)
    assert told.weights == pytest.approx(2 * told.parameters, rel=0.001)  # bfloat16, and the angles of the positions
    assert told.seconds > 0


@pytest.mark.parametrize("command", ["eval", "ablate", "quantize-check"])
def test_a_dry_run_says_the_same_to_people_and_programs_and_writes_nothing(command: str, tmp_path: Path) -> None:
    few = ("demo", "--limit", "2", "--window", "64", "--dry-run")
    shown = run(command, *few, "-o", tmp_path / "out.json")
    asked = run(command, *few, "--json")
    assert (shown.code, asked.code, list(tmp_path.iterdir())) == (0, 0, [])
    assert asked.document["schema"] == "mwtool.forecast/1"
    (entry,) = asked.document["models"]
    assert f"forwards  {entry['forwards']:,}" in shown.out
    assert "memory    about" in shown.out
    assert "time      about" in shown.out
    assert json.loads(asked.out)["model"] == "demo"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("eval", "--resume"),
        ("eval", "--plot"),
        ("ablate", "--save"),
        ("ablate", "--generate"),
        ("quantize-check", "--table"),
    ],
)
def test_a_dry_run_beside_what_acts_on_results_is_wrong_usage(command: str, option: str, tmp_path: Path) -> None:
    value = () if option == "--resume" else (tmp_path / "x.png",)
    more = ("-o", tmp_path / "out.json") if option == "--resume" else ()
    single = ("--mode", "zero", "-k", "1") if option == "--save" else ()
    ran = run(command, "demo", "--dry-run", option, *value, *more, *single)
    assert (ran.code, f"{option} could use" in " ".join(ran.err.split())) == (2, True)


def test_tasks_whose_length_is_known_only_once_they_run_are_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The man"}\n', encoding="utf-8")
    ran = run("eval", "demo", "--task", f"generate:{tmp_path / 'prompts.jsonl'}", "--dry-run", "--json")
    (entry,) = ran.document["models"]
    assert (entry["forwards"], entry["seconds"], len(entry["untried"])) == (None, None, 1)


def test_time_goes_by_batches_but_for_changing_the_model_and_by_the_layer_between_those_tried() -> None:
    states = States(attacked=[Variant(at, nullcontext) for at in (2, 4, 10)], first=Variant(0, nullcontext), said={})
    parts = (Part(1.0, 0.5), Part(1.0, 0.2), Part(0.2, 0.2))
    assert seconds_of(parts, states, 3.0) == pytest.approx(3 * (1 + 1 + 0.8 + 0.2) + 0.5 + 3 * 0.2)
    alone = States(attacked=(), first=Variant(0, nullcontext), said={})
    assert seconds_of(parts[:1], alone, 3.0) == 3.5
