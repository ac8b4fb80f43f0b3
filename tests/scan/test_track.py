"""Checkpoints over training: what is kept of each is its scan's, and nothing is scanned twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub
import pytest
import tiny
import torch
from command import run
from huggingface_hub import utils
from peft import LoraConfig, PeftModel, get_peft_model

import mwtool
from mwtool.errors import BadValue
from mwtool.files.document import text_of
from mwtool.report.page import page_of
from mwtool.scan.scanner import scan_checkpoint, scan_model
from mwtool.scan.settings import Settings
from mwtool.scan.tracking import track as tracking
from mwtool.scan.tracking.document import earlier_in, track_document
from mwtool.scan.tracking.report import HEADING, track_line
from mwtool.scan.tracking.track import Track, kurtosis, stages_in, stages_of, track

SETTINGS = Settings(bos="1")


def model(*, planted: bool, seed: int = 0) -> Any:
    made = tiny.model("llama", seed=seed, num_hidden_layers=4)
    if planted:
        tiny.plant(made)
    return made


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """Three checkpoints; massive from the second on. The order of their names is not that of their steps."""
    for step, planted in ((5, False), (20, True), (100, True)):
        tiny.saved(tmp_path / "run" / f"checkpoint-{step}", model(planted=planted, seed=step))
    return tmp_path / "run"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folder of every checkpoint that is scanned."""
    seen: list[str] = []

    def noting(source: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(source.folder.name)
        return scan_checkpoint(source, *arguments, **named)

    monkeypatch.setattr(tracking, "scan_checkpoint", noting)
    return seen


def test_kurtosis_is_the_fourth_moment_over_the_squared_variance() -> None:
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert kurtosis(normal) == pytest.approx(3, abs=0.05)  # five times its standard error, (24 / N) ** 0.5
    spike = torch.zeros(100, dtype=torch.float64)
    spike[3] = 7.0
    assert kurtosis(spike) == pytest.approx(98.0101, abs=1e-4)  # (1 - 3pq) / pq of a Bernoulli variable, p 1/100
    assert kurtosis(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(1.64)
    assert kurtosis(torch.ones(4)) == 0


def test_checkpoints_come_in_the_order_of_their_steps(training: Path) -> None:
    (training / "runs").mkdir()
    (training / "checkpoint-7").touch()
    assert [(one.name, one.step) for one in stages_in(training)] == [
        ("checkpoint-5", 5), ("checkpoint-20", 20), ("checkpoint-100", 100)
    ]  # fmt: skip
    assert stages_of([str(training)]) == stages_in(training)
    assert [one.model for one in stages_of([str(training), "other"])] == [str(training), "other"]


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="has no folders named checkpoint-N"):
        stages_in(tmp_path)
    with pytest.raises(BadValue, match="is no folder"):
        stages_in(tmp_path / "absent")


def test_names_state_their_step() -> None:
    named = ["step1000", "stage1-step143-tokens2B", "global_step_12", "512", "main", "v1.5"]
    assert [one.step for one in stages_of(["model"], named)] == [1000, 143, 12, 512, None, None]
    assert [one.model for one in stages_of(["a/b", "c"])] == ["a/b", "c"]
    with pytest.raises(BadValue, match="expected one MODEL"):
        stages_of(["a", "b"], ["main"])


def test_what_is_kept_of_each_checkpoint_is_its_scan_s(training: Path) -> None:
    found = track("run", stages_in(training), SETTINGS)
    assert [one.massive is not None for one in found.checkpoints] == [False, True, True]
    for one in found.checkpoints:
        scan = scan_checkpoint(one.stage.model, SETTINGS)
        before = scan.states[:-1]
        assert abs(one.hidden.value) == max(float(state.hidden.abs().max()) for state in before)
        assert scan.states[one.hidden.layer].hidden[one.hidden.index] == one.hidden.value
        assert abs(one.intermediate.value) == max(float(state.intermediate.abs().max()) for state in before)
        assert one.kurtosis == max(kurtosis(state.hidden) for state in before)
        assert len(one.layers) == 4
        if scan.massive is not None:
            assert one.massive is not None
            assert (one.massive.layer, one.massive.rows[0]) == (scan.massive.layer, scan.massive.indices[0]) == (1, 17)
            assert one.massive.z == scan.massive.magnitudes[0]


def test_an_interrupted_run_goes_on_where_it_was(training: Path, tmp_path: Path, scanned: list[str]) -> None:
    file = tmp_path / "track.json"

    def saved(so_far: Track, _one: Any) -> None:
        file.write_text(text_of(track_document(so_far)))
        if len(so_far.checkpoints) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        track(str(training), stages_in(training), SETTINGS, on_checkpoint=saved)
    earlier = earlier_in(file, str(training), SETTINGS)
    found = track(str(training), stages_in(training), SETTINGS, earlier=earlier)
    assert scanned == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    assert track_document(found) == track_document(track(str(training), stages_in(training), SETTINGS))


def test_a_checkpoint_that_changed_is_scanned_again_and_one_that_is_gone_is_kept(
    training: Path, scanned: list[str]
) -> None:
    first = track("run", stages_in(training), SETTINGS)
    shutil.rmtree(training / "checkpoint-5")
    os.utime(training / "checkpoint-100" / "model.safetensors", (1, 1))
    scanned.clear()
    again = track("run", stages_in(training), SETTINGS, earlier=first)
    assert scanned == ["checkpoint-100"]
    assert [one.stage.step for one in again.checkpoints] == [5, 20, 100]


def test_a_file_of_other_settings_or_of_another_run_is_not_gone_on_from(training: Path, tmp_path: Path) -> None:
    file = tmp_path / "track.json"
    assert earlier_in(file, "run", SETTINGS) is None
    file.write_text(text_of(track_document(track("run", stages_in(training)[:1], SETTINGS))))
    assert earlier_in(file, "run", SETTINGS) is not None
    for name, settings, dtype, said in (
        ("other", SETTINGS, "auto", "model 'run', and this run has 'other'"),
        ("run", Settings(bos="1", k=2), "auto", "k 5, and this run has 2"),
        ("run", SETTINGS, "bfloat16", "dtype 'float32', and this run has 'bfloat16'"),
    ):
        with pytest.raises(BadValue, match=said):
            earlier_in(file, name, settings, dtype)
    file.write_text("{}")
    with pytest.raises(BadValue, match="as `mwtool track -o` writes"):
        earlier_in(file, "run", SETTINGS)


def test_models_of_another_shape_and_revisions_of_local_ones_are_refused(training: Path) -> None:
    tiny.saved(training / "checkpoint-200", tiny.model("llama", num_hidden_layers=2))
    with pytest.raises(BadValue, match=r"checkpoint-200 has shape .*; the checkpoints before it have"):
        track("run", stages_in(training), SETTINGS)
    with pytest.raises(BadValue, match="demo is local and has no revisions"):
        track("demo", stages_of(["demo"], ["v1"]), SETTINGS)
    with pytest.raises(BadValue, match="no checkpoint to track"):
        track("none", (), SETTINGS)


def test_peft_checkpoints_are_merged_and_each_is_the_scan_of_the_model_that_peft_merges(
    tmp_path: Path, scanned: list[str]
) -> None:
    """A row that answers bos grows in `up` of layer 1 over three checkpoints of an adapter; beside them its base."""
    base, run_folder = tiny.saved(tmp_path / "base", model(planted=False)), tmp_path / "run"
    wrapped: Any = get_peft_model(
        tiny.opened(base),
        LoraConfig(r=2, target_modules=["up_proj", "gate_proj"], init_lora_weights=False),
    )
    expected = []
    for step in (10, 20, 100):
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if ".layers.1." in name and "lora_B" in name:
                    parameter[17] *= 10
        wrapped.save_pretrained(run_folder / f"checkpoint-{step}")
        merged = PeftModel.from_pretrained(tiny.opened(base), run_folder / f"checkpoint-{step}").merge_and_unload()
        expected.append(scan_model(merged, settings=SETTINGS))
    stages = (*stages_of([str(base)]), *stages_in(run_folder))
    found = track("run", stages, SETTINGS)
    for one, scan in zip(found.checkpoints[1:], expected, strict=True):
        largest = float(scan.states[1].intermediate.abs().max())
        assert one.layers[1].intermediate == pytest.approx(
            largest, rel=1e-5
        )  # another place in memory, another last bit
    grown = [one.layers[1].intermediate for one in found.checkpoints]
    assert grown == sorted(grown)
    assert grown[-1] > 2 * grown[0]
    assert sum("was merged into its base model" in note for note in found.notes) == 1
    scanned.clear()
    os.utime(run_folder / "checkpoint-20" / "adapter_model.safetensors", (1, 1))
    track("run", stages, SETTINGS, earlier=found)
    assert len(scanned) == 1
    os.utime(base / "model.safetensors", (1, 1))  # what they are merged into
    track("run", stages, SETTINGS, earlier=found)
    assert len(scanned) == 5
    with pytest.raises(BadValue, match="checkpoint-10 is local and has no revisions"):
        track("lora", stages_of([str(run_folder / "checkpoint-10")], ["v1"]), SETTINGS)


def test_the_command_prints_a_line_a_checkpoint_and_draws_them(
    training: Path, tmp_path: Path, scanned: list[str]
) -> None:
    file, plot = tmp_path / "track.json", tmp_path / "track.svg"
    ran = run("track", "--checkpoints", training, "--bos", 1, "-o", file, "--plot", plot)
    assert ran.code == 0, ran.err
    heading, *lines = ran.out.splitlines()
    assert heading.split() == "checkpoint layer rows max |z| layer max |h| layer kurtosis".split()
    assert [line.split()[:3] for line in lines] == [["5", "-", "-"], ["20", "1", "17"], ["100", "1", "17"]]
    assert "first at step 20 (layer 1)" in plot.read_text()
    scanned.clear()
    again = run("track", "--checkpoints", training, "--bos", 1, "-o", file, "--json")
    assert scanned == []
    assert {**again.document, "command": None} == {**json.loads(file.read_text()), "command": None}


def test_of_a_long_path_the_end_is_shown(training: Path) -> None:
    (point,) = track("run", stages_in(training)[:1], SETTINGS).checkpoints
    named = replace(point, stage=replace(point.stage, name="/a/long/way/to/models/smollm2", step=None))
    assert track_line(named).startswith("...odels/smollm2  ")


def test_every_key_is_described(training: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    described = page.partition("## `mwtool.track/1`")[2].partition("\n## ")[0]
    document = track_document(track("run", stages_in(training), SETTINGS))
    one = document["checkpoints"][1]
    keys = {"checkpoints", "settings", *one, *one["massive"], *one["layers"][0], *one["hidden"], *document["settings"]}
    assert sorted(key for key in keys if f"`{key}`" not in described) == []


def test_the_figure_marks_checkpoints_with_a_massive_layer_and_the_page_lists_all(training: Path) -> None:
    document = track_document(track("run", stages_in(training), SETTINGS))
    figure = mwtool.plot_track(document)
    _, filled, hollow, *_ = figure.axes[0].lines
    assert list(filled.get_xdata()) == [20, 100]  # type: ignore[arg-type] # what was given
    assert list(hollow.get_xdata()) == [5]  # type: ignore[arg-type] # likewise
    figure.canvas.draw()
    alone = {**document, "checkpoints": [{**document["checkpoints"][0], "step": None}]}
    mwtool.plot_track(alone).canvas.draw()
    page = page_of([document])
    assert "first checkpoint with a massive layer is step 20, where it is layer 1" in page
    with pytest.raises(BadValue, match="track/1"):
        mwtool.plot_track({"schema": "mwtool.scan/2"})


def test_the_run_in_the_documentation_is_that_of_the_document_beside_it() -> None:
    """Training it takes too long for a test; its document is kept, and what the page shows is made of it."""
    docs = Path(__file__).parents[2] / "docs"
    found = earlier_in(docs / "examples" / "track.json", "run", Settings(thresholds=mwtool.Thresholds(ratio=20)))
    assert found is not None
    lines = "\n".join([HEADING, *map(track_line, found.checkpoints)])
    page = (docs / "track.md").read_text(encoding="utf-8")
    assert f"```text\n{lines}\n```" in page
    assert all({17, 49, 174} <= set(one.massive.rows) for one in found.checkpoints[3:] if one.massive is not None)
    assert f"largest ratio is {max(abs(one.hidden.value) / one.median for one in found.checkpoints):.0f}" in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nothing to track"),
        (["demo", "--checkpoints", "run"], "leave out MODEL"),
        (["a", "b", "--revisions", "main"], "2 are given"),
    ],
)
def test_contradicting_options_are_wrong_usage(options: list[str], said: str) -> None:
    ran = run("track", *options)
    assert (ran.code, ran.out) == (2, "")
    assert said in " ".join(ran.err.split())


@pytest.fixture
def served(training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
    """A Hub whose `some/model` has a revision for each checkpoint."""
    with hub.serving() as found:
        found.repos["some/model"] = training / "checkpoint-100"
        found.versions = {f"step{step}": (f"{step:040d}", training / f"checkpoint-{step}") for step in (5, 20)}
        hub.use(found.endpoint, tmp_path / "cache", monkeypatch)
        yield found
    utils.close_session()


def test_revisions_of_a_model_are_fetched_one_after_the_other(served: hub.Hub, tmp_path: Path) -> None:
    file = tmp_path / "track.json"
    ran = run("track", "some/model", "--revisions", "step5,step20", "--bos", 1, "-o", file, "--json")
    assert ran.code == 0, ran.err
    found = [(one["name"], one["step"], one["fingerprint"][-2:]) for one in ran.document["checkpoints"]]
    assert found == [("step5", 5, "05"), ("step20", 20, "20")]
    assert [one["massive"] is not None for one in ran.document["checkpoints"]] == [False, True]
    held = len(served.parts)
    more = run("track", "some/model", "--revisions", "main", "--bos", 1, "-o", file, "--json")
    assert [one["name"] for one in more.document["checkpoints"]] == ["step5", "step20", "main"]
    assert "model.safetensors" not in served.sent  # by ranges,
    assert 2 * len(served.parts) == 3 * held  # and what was scanned before is not fetched again
    assert "has no revision 'nosuch'" in run("track", "some/model", "--revisions", "nosuch", "--bos", 1, "--json").fault
