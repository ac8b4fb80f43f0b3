"""The report of a scan: the same answer as its document, in lines that fit."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console, RenderableType
from transformers import PreTrainedModel

from mwtool import Scan, Settings, scan_model
from mwtool.scan.report import LEVELS, Checked, scan_report, sparkline
from mwtool.scan.settings import ByHand
from mwtool.scan.story import overflow
from mwtool.scan.tables import protect_table, states_table, super_weights_table

DIM = 5


def text(shown: RenderableType, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), markup=False, emoji=False)
    console.print(shown)
    file: Any = console.file
    return str(file.getvalue())


def lines(shown: RenderableType, width: int = 80) -> list[str]:
    return text(shown, width).splitlines()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = tiny.quiet(tiny.model("llama"))
    tiny.write(made, 1, 11, {DIM: 300.0}, z=90.0)
    tiny.write(made, 2, 12, {DIM: -280.0}, z=900.0)
    tiny.write(made, 4, 14, {DIM: 70000.0}, z=400.0)
    tiny.write(made, 6, 16, {DIM: -65000.0}, z=2000.0)
    return made


@pytest.fixture(scope="module")
def scan(model: PreTrainedModel) -> Scan:
    return scan_model(model)


@pytest.fixture(scope="module")
def steps() -> Scan:
    """Fourteen layers that add the same each."""
    made = tiny.quiet(tiny.model("llama", num_hidden_layers=20))
    for layer in range(1, 15):
        tiny.write(made, layer, 11, {DIM: 900.0}, z=100.0 if layer == 1 else 50.0)
    return scan_model(made)


def test_the_report_shows_every_event_and_marks_the_massive_one(scan: Scan) -> None:
    shown = lines(scan_report(scan, 80))
    table = [line for line in shown if any(word in line.split() for word in ("write", "rewrite", "erase"))]
    assert [line.split()[1 + ("▶" in line)] for line in table] == ["1", "2", "4", "6"]
    (marked,) = [line for line in table if line.startswith("▶")]
    assert marked.split()[2:5] == ["4", "rewrite", "5"]
    said = " ".join(" ".join(shown).split())
    assert "Massive layer 4 (model.layers.4.mlp, the paper's layer 5): the largest |z| of all writes." in said
    assert "is written at layer 1, erased at 2, written again at 4 and removed at 6." in " ".join(
        " ".join(shown).split()
    )


def test_the_report_of_a_few_events_is_a_screen_of_80_columns(scan: Scan) -> None:
    shown = lines(scan_report(scan, 80))
    assert len(shown) <= 34
    assert max(map(len, shown)) <= 80
    assert not any("…" in line for line in shown)


def test_a_value_above_the_largest_float16_is_named_with_its_layer(scan: Scan) -> None:
    warning = overflow(scan)
    assert warning is not None
    top = max(float(state.hidden.abs().max()) for state in scan.states)
    assert f"|h| reaches {top:,.0f} after layer" in warning
    assert "(dimension 5), above float16's largest value, 65,504, from layer 4 on" in warning
    assert " ".join(warning.split()) in " ".join(text(scan_report(scan, 80)).split())
    assert overflow(replace(scan, states=scan.states[:4])) is None


def test_many_events_of_one_kind_share_a_line_unless_all_are_asked_for(steps: Scan) -> None:
    def rows(*, every: bool) -> list[list[str]]:
        shown = lines(scan_report(steps, 80, every=every))
        return [line.replace("▶", "").split() for line in shown if "build-up " in line and "%" in line and "5" in line]

    folded = [row[:4] for row in rows(every=False) if row[2] == "build-up"]
    assert folded == [["0", "1", "build-up", "5"], ["1-13", "2-14", "build-up", "5"]]
    assert len([row for row in rows(every=True) if row[2] == "build-up"]) == 14
    assert "a build-up, so the rows of one layer may not matter" in " ".join(text(scan_report(steps, 80)).split())


def test_a_partial_walk_says_what_it_has_not_seen(model: PreTrainedModel) -> None:
    shown = " ".join(text(scan_report(scan_model(model, settings=Settings(last_layer=4)), 80)).split())
    assert "Only layers 0 to 4 of 8 were run" in shown
    assert "Only layers" not in text(scan_report(scan_model(model), 80))


def test_rows_chosen_by_hand_are_called_so_beside_what_the_definitions_say(model: PreTrainedModel) -> None:
    shown = " ".join(text(scan_report(scan_model(model, settings=Settings(by_hand=ByHand(event=3))), 80)).split())
    assert "Chosen by hand: layer 6" in shown
    assert "By the definitions it would be layer 4." in shown


def test_a_check_adds_its_columns_and_its_conclusion_and_still_fits(scan: Scan) -> None:
    check = Checked(k=5, cells={2: ("x2.46", "x1.12")}, lines=("The model leans on event 2.",))
    shown = lines(scan_report(scan, 80, check=check))
    (header,) = [line for line in shown if "zero 5" in line]
    assert "retain 5" in header
    (marked,) = [line for line in shown if "x2.46" in line]
    assert marked.startswith("▶")
    assert "The model leans on event 2." in shown
    assert max(map(len, shown)) <= 80


@pytest.mark.parametrize(
    ("embedded", "last", "words"),
    [
        (5000.0, 0.0, "No massive layer: the stream has massive dimensions (5), but no FFN writes them up"),
        (500.0, 3000.0, "No massive layer: the only FFN that writes a massive dimension up is in the last layer."),
        (0.0, 0.0, "No massive activations at this token. The largest entry of the residual stream is"),
    ],
)
def test_without_a_massive_layer_the_report_says_why(embedded: float, last: float, words: str) -> None:
    made = tiny.quiet(tiny.model("llama"))
    with torch.no_grad():
        made.get_input_embeddings().weight[tiny.BOS, DIM] += embedded
    if last:
        tiny.write(made, tiny.LAYERS - 1, 3, {DIM: last})
    assert words in " ".join(text(scan_report(scan_model(made), 80)).split())


def test_layers_without_news_are_folded_unless_all_are_asked_for(scan: Scan, steps: Scan) -> None:
    every = lines(states_table(steps, 80, every=True))
    assert len(every) == 20 + 3
    folded = lines(states_table(steps, 80))
    assert any(line.split()[0] == "15-18" for line in folded if line.strip())
    for shown in (every, folded, lines(states_table(scan, 80))):
        assert max(map(len, shown)) <= 80
        assert not any("…" in line for line in shown)


def test_eighty_layers_fit_in_eighty_columns() -> None:
    made = tiny.quiet(tiny.model("llama", num_hidden_layers=80))
    tiny.write(made, 3, 11, {DIM: 70000.0}, z=3000.0)
    tiny.write(made, 78, 12, {DIM: -69000.0}, z=2000.0)
    scan = scan_model(made)
    for shown in (
        scan_report(scan, 80),
        states_table(scan, 80),
        states_table(scan, 80, every=True),
        protect_table(scan),
    ):
        assert max(map(len, lines(shown))) <= 80
    assert len(lines(states_table(scan, 80))) < 30


def test_super_weights_and_places_are_listed_with_their_events(scan: Scan) -> None:
    supers = [line.split() for line in lines(super_weights_table(scan))[3:]]
    assert [(int(one[0]), int(one[1])) for one in supers] == [
        (next(n for n, event in enumerate(scan.events) if event.layer == w.layer), w.layer) for w in scan.super_weights
    ]
    shown = text(protect_table(scan), 120)
    for event, places in zip(scan.events, scan.event_protect, strict=True):
        assert f"model.layers.{event.layer}.mlp.down_proj.weight" in shown
        assert ", ".join(map(str, places[0].indices)) in shown


def test_levels_rise_with_the_logarithm_and_share_a_character_where_there_are_too_many() -> None:
    line = sparkline([0.0, 1.0, 10.0, 100.0, 1000.0, 10000.0], 10000.0, 40)
    assert len(line) == 6
    assert line[0] == line[1] == LEVELS[0]
    assert line[-1] == LEVELS[-1]
    assert [LEVELS.index(one) for one in line] == sorted(LEVELS.index(one) for one in line)
    assert sparkline([1.0, 10000.0] * 40, 10000.0, 40) == LEVELS[-1] * 40
