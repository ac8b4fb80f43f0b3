"""What a check concludes from what it measures, and that it measures what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from words import planted

from mwtool.ablation.check import PASSES, Control, EventCheck, cells_of, check_scan, leaning, lines_of
from mwtool.errors import BadValue
from mwtool.evaluation.comparison import Ratio, ratio_of
from mwtool.evaluation.evaluate import measure
from mwtool.evaluation.measurement import Options
from mwtool.evaluation.tasks import parse_tasks
from mwtool.models.load import Loaded
from mwtool.scan.loaded import scan_loaded
from mwtool.scan.report import Checked, scan_report
from mwtool.scan.scanner import Scan, Settings
from mwtool.surgery.attack import Attack, edited

SMALL: Any = {"limit": 4, "window": 32}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def scan(loaded: Loaded) -> Scan:
    return scan_loaded(loaded, Settings(k=2))


@pytest.fixture(scope="module")
def text(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> str:
    words = (Path(loaded.source.folder) / "text.txt").read_text()
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(" ".join([words] * 3))
    return str(path)


def test_the_ratios_are_those_of_whole_forwards_on_the_same_windows(loaded: Loaded, scan: Scan, text: str) -> None:
    found = check_scan(loaded, scan, text, **SMALL)
    assert (found.k, found.windows, found.tokens) == (2, 4, 4 * 31)
    assert [one.event for one in found.events] == list(range(len(scan.events)))
    tasks, options = parse_tasks([f"ppl:{text}"]), Options(window=32, limit=4)
    (plain,) = measure(loaded, tasks, options)
    for one in found.events:
        rows = scan.events[one.event].rows
        for mode, ratio in (("zero", one.zero), ("retain", one.retain)):
            with edited(loaded.base, loaded.ffn(rows), rows.indices[:2], Attack(mode, 2)):  # type: ignore[arg-type] # a mode
                (attacked,) = measure(loaded, tasks, options)
            assert ratio == ratio_of(attacked, plain)
    assert found.random is not None
    assert not {*found.random.rows} & {*scan.events[0].rows.indices}


def ratios(*values: tuple[float, float, float] | None) -> list[EventCheck]:
    return [
        EventCheck(event=at, layer=at, rows=(1,), zero=None if one is None else Ratio(*one), retain=None)
        for at, one in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("events", "random", "expected"),
    [
        (((2.5, 2.2, 2.8), (1.6, 1.55, 1.7)), (1.0, 0.99, 1.01), 0),
        (((1.6, 1.55, 1.7), (2.5, 1.4, 2.8)), (1.0, 0.99, 1.01), 0),  # the larger one may be chance
        (((1.22, 1.2, 1.25), (1.1, 1.0, 1.2)), (1.0, 0.99, 1.01), None),
        (((2.5, 2.2, 2.8),), (2.0, 1.5, 2.3), None),  # random rows cost as much
        (((2.5, 2.2, 2.8), None), None, 0),
        ((None,), None, None),
    ],
)
def test_a_model_leans_on_the_event_that_costs_most_beyond_doubt(
    events: Any, random: Any, expected: int | None
) -> None:
    control = None if random is None else Control(layer=0, rows=(2,), zero=Ratio(*random))
    assert leaning(ratios(*events), control) == expected


def test_without_an_interval_the_ratio_itself_is_judged() -> None:
    one = EventCheck(event=0, layer=0, rows=(1,), zero=Ratio(1.7, None, None), retain=None)
    assert leaning([one], None) == 0
    assert leaning([one], Control(layer=0, rows=(2,), zero=Ratio(1.8, None, None))) is None


def test_prediction_and_check_are_both_said_where_they_disagree(loaded: Loaded, scan: Scan, text: str) -> None:
    """The planted row matters to nothing on random text, so that the model leans on no event."""
    found = check_scan(loaded, scan, text, **SMALL)
    said = " ".join(found.conclusion)
    assert (found.predicted, found.leans_on) == (0, None)
    assert "this model does not break. Zeroing the 2 rows of one event costs at most x" in said
    assert "The scan predicts event 0 (layer 1); by the check the model leans on none." in said
    assert "2 random rows of layer 1 cost x" in said


def test_report_and_document_have_the_ratios(loaded: Loaded, scan: Scan, text: str) -> None:
    from rich.console import Console

    found = check_scan(loaded, scan, text, **SMALL)
    console = Console(width=100, record=True)
    console.print(scan_report(scan, 100, every=True, check=Checked(found.k, cells_of(found), lines_of(found))))
    shown = console.export_text()
    assert "zero 2" in shown
    assert "retain 2" in shown
    assert cells_of(found)[0][0] in shown
    document = found.document()
    assert document["leans_on"] is None
    assert document["events"][0]["zero"]["low"] <= document["events"][0]["zero"]["ratio"]
    assert document["random"]["layer"] == 1


def test_many_events_are_checked_on_less_text(loaded: Loaded, scan: Scan, text: str) -> None:
    """By construction a check costs no more than so many forwards of everything."""
    from dataclasses import replace

    many = replace(scan, events=scan.events * 12)
    found = check_scan(loaded, many, text, **SMALL)
    runs = 1 + 2 * len(many.events) + 2
    assert runs > PASSES
    assert found.tokens * runs <= PASSES * 4 * 31
    assert found.notes


def test_a_text_that_is_too_short_or_empty_is_refused(loaded: Loaded, scan: Scan, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3 " * 20)
    with pytest.raises(BadValue, match=r"short.txt has 6\d tokens; --check needs at least 256, 8 windows of 32"):
        check_scan(loaded, scan, str(short))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BadValue, match="empty"):
        check_scan(loaded, scan, str(tmp_path / "empty.txt"))
    with pytest.raises(BadValue, match=r"absent\.txt"):
        check_scan(loaded, scan, str(tmp_path / "absent.txt"))


def test_a_text_that_fills_no_whole_windows_is_cut_into_shorter_ones(loaded: Loaded, scan: Scan, text: str) -> None:
    found = check_scan(loaded, scan, text, limit=8, window=512)
    assert found.windows == 8
    assert 8 * 31 <= found.tokens <= 8 * 64


def test_a_scan_without_events_has_nothing_to_check(loaded: Loaded, scan: Scan, text: str) -> None:
    from dataclasses import replace

    with pytest.raises(BadValue, match="found no event"):
        check_scan(loaded, replace(scan, events=()), text)
