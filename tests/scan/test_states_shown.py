"""States by position, sinks, triggers and routing in the document, as tables, as figures, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import run
from words import planted_folder

import mwtool
from mwtool.errors import BadValue
from mwtool.files.scan_schema import ScanDocument
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.settings import Settings, Texts
from mwtool.scan.states_plot import figures_of

TEXT = "w4 w30 w7"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a mixture of experts, with everything."""
    folder = planted_folder(tmp_path_factory.mktemp("mixture"), "mixtral", num_hidden_layers=4)
    text = str(folder / "text.txt")
    wanted = Texts(positions=TEXT, attention=True, sinks=text, sink_length=16, triggers=text, length=16)
    found: dict[str, Any] = json.loads(json.dumps(scan_checkpoint(str(folder), Settings(texts=wanted)).to_dict()))
    return found


def test_an_older_document_without_these_keys_stays_readable(document: dict[str, Any]) -> None:
    older = {key: document[key] for key in document if key not in ("positions", "sinks", "triggers", "routing")}
    assert ScanDocument.model_validate(older).positions is None
    assert ScanDocument.model_validate(document).positions is not None
    assert [name for name, _ in figures_of(older)] == []


def test_every_key_is_described(document: dict[str, Any]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")

    def keys(value: Any) -> set[str]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return {*(value if isinstance(value, dict) else ()), *(key for one in inner for key in keys(one))}

    assert [key for key in sorted(keys(document)) if f"`{key}`" not in page] == []


def test_router_probabilities_of_every_layer_are_those_of_all_experts(document: dict[str, Any]) -> None:
    assert [one["layer"] for one in document["routing"]] == [0, 1, 2, 3]
    assert all(sum(one["probabilities"]) == pytest.approx(1, abs=1e-3) for one in document["routing"])
    massive, router = document["massive"], document["router"]
    chosen = document["routing"][massive["layer"]]["probabilities"]
    for one in router["probabilities"]:
        assert chosen[one["expert"]] == pytest.approx(one["probability"], rel=1e-3)


def test_each_figure_names_the_model_and_is_drawn_from_the_document_alone(document: dict[str, Any]) -> None:
    drawn = dict(figures_of(document))
    assert list(drawn) == ["positions", "surface", "attention", "sinks", "router"]
    for name, figure in drawn.items():
        assert document["model"].rpartition("/")[2] in figure.get_supxlabel(), name
        assert figure.get_size_inches()[0] == 3.5
        figure.canvas.draw()


def test_the_heat_maps_hold_the_bins_and_the_bars_the_attention(document: dict[str, Any]) -> None:
    figure = mwtool.plot_positions(document)
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    for n, one in enumerate(document["positions"]["placements"]):
        for column, state in enumerate(("hidden", "intermediate")):
            shown = panels[3 * n + column].images[0].get_array()
            assert shown is not None
            assert shown.tolist() == one[state]["bins"]
        assert [bar.get_width() for bar in panels[3 * n + 2].patches] == one["after"]


def test_a_figure_of_what_a_scan_does_not_have_says_how_to_make_it() -> None:
    scan = mwtool.scan_model(tiny.model("llama", num_hidden_layers=2), None, Settings(bos="1"))
    for plot, expected in (
        (mwtool.plot_positions, "--positions TEXT"),
        (mwtool.plot_attention, "--positions TEXT --attention"),
        (mwtool.plot_sinks, "--sinks"),
        (mwtool.plot_router, "no routed experts"),
    ):
        with pytest.raises(BadValue, match=expected):
            plot(scan)


def test_the_command_shows_tables_and_writes_a_figure_for_each(tmp_path: Path) -> None:
    plot, triggers = tmp_path / "scan.svg", tmp_path / "triggers.json"
    ran = run("scan", "--positions", "Summer is warm.", "--attention", "--sinks", "--text", "demo", "--limit", 1,
              "--window", 64, "--triggers", triggers, "--plot", plot)  # fmt: skip
    assert ran.code == 0, ran.err
    words = " ".join(ran.out.split())
    assert "bos in the middle" in words
    assert "of heads pay the first token more than 0.3" in words
    assert "Triggers: 1 of 64 positions are massive" in words
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"triggers.json", "scan.svg", *(f"scan-{one}.svg" for one in
                     ("positions", "surface", "attention", "sinks"))}  # fmt: skip
    assert [one["token"] for one in json.loads(triggers.read_text())["triggers"]["tokens"]] == ["<s>"]


def test_threshold_and_window_of_the_sink_rate_are_those_asked_for_and_recorded(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night and the rain fell in torrents. " * 20)
    found = [
        run("scan", "--sinks", text, "--sink-length", 32, "--sink-epsilon", eps, "--json").document["sinks"]
        for eps in (0.3, 0.9, 1)
    ]
    assert [(one["eps"], one["length"]) for one in found] == [(0.3, 32), (0.9, 32), (1, 32)]
    assert found[0]["rate"] > found[1]["rate"] > found[2]["rate"] == 0
    scores = [[layer["scores"] for layer in one["layers"]] for one in found]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--attention"], 2, "give one with --positions"),
        (["--triggers", "t.json"], 2, "add --text FILE"),
        (["--positions", "absent.txt"], 1, "absent.txt does not exist"),
        (["--sinks", "absent"], 1, "absent does not exist"),
        (["--sink-epsilon", "0.8"], 2, "are of --sinks; add that"),
        (["--sinks", "demo", "--sink-epsilon", "1.5"], 2, "less than or equal to 1"),
        (["--text", "absent.txt"], 1, "absent.txt does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_model_is_read(
    options: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("scan", *options)
    assert (ran.code, ran.out) == (code, "")
    assert said in " ".join(ran.err.split())
