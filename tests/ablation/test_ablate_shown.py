"""An ablation as it is shown: its document, its table, its figure."""

from __future__ import annotations

import io
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from rich.console import Console
from sweeps import measured, swept
from words import LAYERS, opened, planted, with_tokenizer

from mwtool.ablation.document import ablate_document
from mwtool.ablation.head import head_of
from mwtool.ablation.plot import draw_task, plot_ablation
from mwtool.ablation.report import ablate_report
from mwtool.ablation.schema import AblateDocument
from mwtool.ablation.sweep import Ablation, Run, Sweep
from mwtool.errors import BadValue
from mwtool.evaluation.measurement import Measured
from mwtool.models.load import Loaded
from mwtool.scan.settings import Choice
from mwtool.scan.targets import Target
from mwtool.surgery.attack import Attack, parse_mode


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return planted(tmp_path_factory.mktemp("planted"))


def accuracy(value: float) -> Measured:
    return Measured(task="mc:x.jsonl", metric="acc", value=value, stderr=None, n=4, seconds=0.0, samples=(1.0, 0.0))


def made_up(loaded: Loaded) -> Ablation:
    """A perplexity and an accuracy, under one attack, two random controls and the rows of largest norm."""
    target, attack = Target(layer=1, ffn=loaded.layers[1].ffns[0], indices=(17, 3)), Attack("zero", 1)
    plain = [3.0, 4.0, 5.0, 6.0, 2.0]
    counts = [1.0] * 5

    def run(control: str | None, more: float, right: float) -> Run:
        found = (measured([x + more for x in plain], counts), accuracy(right))
        return Run(attack=attack, control=control, targets=(target,), rows=((17,),), measured=found)

    runs = (run(None, 0.5, 0.25), run("random:0", 0.1, 0.5), run("random:1", 0.3, 0.75), run("norm", 0.2, 0.5))
    return Ablation(
        baseline=(measured(plain, counts), accuracy(0.5)), runs=runs, verdicts=(), notes=(), head=head_of(loaded)
    )


def test_an_accuracy_has_points_and_no_ratio(loaded: Loaded) -> None:
    run = ablate_document(loaded, made_up(loaded))["runs"][0]
    assert run["ratio"] == {"ppl:x": pytest.approx(math.exp(0.5)), "mc:x.jsonl": None}
    assert run["delta"] == {"ppl:x": None, "mc:x.jsonl": -25.0}


def test_what_is_not_finite_is_said_and_no_ratio_is_made_of_it(loaded: Loaded) -> None:
    found = swept(loaded, Sweep((Attack("scale", 0, 1e38),), (1,), draws=2))
    run = found.runs[0]
    assert run.measured[0].nonfinite is not None
    assert found.verdicts == ()
    document = ablate_document(loaded, found)["runs"][0]
    assert list(document["results"].values()) == [None]
    assert list(document["ratio"].values()) == [None]
    assert "finite" in next(iter(document["nonfinite"].values()))


def test_the_table_shows_the_mean_and_the_spread_of_the_controls(loaded: Loaded) -> None:
    console = Console(width=120, file=io.StringIO(), no_color=True)
    console.print(ablate_report(made_up(loaded), width=120))
    assert isinstance(console.file, io.StringIO)
    line = next(line for line in console.file.getvalue().splitlines() if line.startswith("zero"))
    ratios = [math.exp(0.1), math.exp(0.3)]
    spread = f"{statistics.fmean(ratios):.2f} ± {statistics.stdev(ratios):.2f}"
    expected = (
        f"zero 1 {math.exp(4.5):.2f} x{math.exp(0.5):.2f} {spread} {math.exp(0.2):.2f} 25.0 -25.0 +12.5 ± 17.7 +0.0"
    )
    assert line.split() == expected.split()


@pytest.mark.parametrize("model_type", ["phi3", "gpt2", "mixtral"])
def test_a_figure_is_drawn_for_fused_transposed_and_expert_rows(tmp_path: Path, model_type: str) -> None:
    loaded = opened(with_tokenizer(tmp_path, tiny.model(model_type, num_hidden_layers=2)))
    for choice in (Choice(layers=(1,)), Choice(each_layer=True)):
        figure = plot_ablation(swept(loaded, Sweep(ks=(1,), draws=1), choice))
        entries = [text.get_text() for text in figure.legends[0].get_texts()]
        assert sum("random rows" in entry for entry in entries) == 2


def drawn(found: Ablation, task: str) -> Axes:
    """The panel of one task, after the figure was laid out."""
    panel = Figure().subplots()
    draw_task(panel, found.to_dict(), task)
    return panel


def series(panel: Axes) -> dict[str, Any]:
    """Label -> points of the attacks (with bars) and of the controls."""
    bars = {str(one.get_label()): one.lines[0] for one in panel.containers if isinstance(one, ErrorbarContainer)}
    controls = {str(one.get_label()): one for one in panel.lines if not str(one.get_label()).startswith("_")}
    return {**controls, **bars}


def test_several_layers_are_points_over_the_layers_that_no_line_joins(loaded: Loaded) -> None:
    found = swept(loaded, Sweep((Attack("zero"),), (1, 2), draws=2), Choice(each_layer=True))
    panel = drawn(found, found.baseline[0].task)
    assert panel.get_xlabel().startswith("decoder layers")
    lines = series(panel)
    for k in (1, 2):
        values = [run.measured[0].value for run in found.runs if (run.attack.k, run.control) == (k, None)]
        expected = [value / found.baseline[0].value for value in values]
        assert [round(x) for x in lines[f"zero {k}"].get_xdata()] == list(range(LAYERS))
        assert list(lines[f"zero {k}"].get_ydata()) == pytest.approx(expected, rel=1e-9)
    assert {line.get_linestyle() for line in lines.values()} == {"None"}


def test_places_attacked_together_are_named_on_the_axis(loaded: Loaded) -> None:
    found = swept(loaded, Sweep((Attack("zero"),), (1,), draws=0), Choice(layers=(0, 2)))
    alone = swept(loaded, Sweep((Attack("zero"),), (1,), draws=0), Choice(layers=(1,)))
    panel = drawn(replace(found, runs=(*found.runs, *alone.runs)), found.baseline[0].task)
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0+2", "1"]


@pytest.mark.parametrize(("more", "scale"), [(0.5, "linear"), (3.0, "log"), (6.0, "log")])
def test_ratios_over_more_than_a_decade_have_a_log_axis(loaded: Loaded, more: float, scale: str) -> None:
    """Of 20 and of 400 times the perplexity: the larger the ratio, the further below zero a linear axis begins."""
    found = made_up(loaded)
    plain = found.baseline[0]
    assert plain.weights is not None
    attacked = measured([x + more for x in plain.samples], list(plain.weights))
    first = replace(found.runs[0], measured=(attacked, found.runs[0].measured[1]))
    assert drawn(replace(found, runs=(first, *found.runs[1:])), "ppl:x").get_yscale() == scale


def test_the_curves_of_an_accuracy_are_points(loaded: Loaded) -> None:
    panel = drawn(made_up(loaded), "mc:x.jsonl")
    lines = {name: list(line.get_ydata()) for name, line in series(panel).items()}
    assert lines == {"zero": [-25.0], "zero, random rows": [12.5], "zero, rows of largest norm": [0.0]}
    assert panel.get_ylabel() == "change of acc, points"


def test_the_legend_hides_no_curve(loaded: Loaded) -> None:
    """It lies above the panels, has every series once, and each attack before its controls."""
    modes = tuple(map(parse_mode, ("zero", "retain", "mean", "scale:0.5")))
    figure = plot_ablation(swept(loaded, Sweep(modes, (0, 1, 3), draws=2)))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    kinds = ("", ", random rows", ", rows of largest norm")
    assert names == [f"{mode}{kind}" for mode in ("zero", "retain", "mean", "scale:0.5") for kind in kinds]
    assert legend.get_window_extent().y0 >= figure.axes[0].get_window_extent().y1


def test_equal_series_do_not_hide_each_other(loaded: Loaded) -> None:
    """Retaining and zeroing no row of an idle attack give equal ratios; their points lie side by side."""
    found = swept(loaded, Sweep((Attack("zero"), Attack("retain")), (1, 3), draws=0))
    same = replace(found, runs=tuple(replace(run, measured=found.runs[0].measured) for run in found.runs))
    lines = series(drawn(same, found.baseline[0].task))
    assert list(lines["zero"].get_ydata()) == list(lines["retain"].get_ydata())
    assert not {*lines["zero"].get_xdata()} & {*lines["retain"].get_xdata()}


def test_the_curves_are_the_ratios_over_k_with_their_intervals(loaded: Loaded) -> None:
    found = swept(loaded, Sweep((Attack("retain"),), (0, 1, 3), draws=2))
    panel = drawn(found, found.baseline[0].task)
    lines = series(panel)
    ratios = {(run.attack.k, run.control): run.measured[0].value / found.baseline[0].value for run in found.runs}
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "1", "3"]
    assert list(lines["retain"].get_ydata()) == pytest.approx([ratios[k, None] for k in (0, 1, 3)], rel=1e-9)
    means = [(ratios[k, "random:0"] + ratios[k, "random:1"]) / 2 for k in (1, 3)]
    assert list(lines["retain, random rows"].get_ydata()) == pytest.approx(means, rel=1e-9)
    norm = lines["retain, rows of largest norm"]
    assert list(norm.get_ydata()) == pytest.approx([ratios[k, "norm"] for k in (1, 3)], rel=1e-9)
    (bars,) = [one for one in panel.containers if isinstance(one, ErrorbarContainer)]
    ends = [(low, high) for (_, low), (_, high) in bars.lines[2][0].get_segments()]
    runs = [run for run in found.to_dict()["runs"] if run["control"] is None]
    assert ends == [pytest.approx(tuple(next(iter(run["interval"].values())))) for run in runs]


def test_a_change_of_accuracy_is_drawn_with_its_interval_paired_by_questions(loaded: Loaded) -> None:
    """By hand: d = (-1, 0, -1, 0), mean -0.5, s = 0.577, t of 3 degrees of freedom 3.182: -50 -+ 91.9 points."""
    found = made_up(loaded)
    given = {"n": 4, "digest": "same"}
    plain = replace(accuracy(1.0), samples=(1.0, 1.0, 1.0, 1.0), **given)
    after = replace(accuracy(0.5), samples=(0.0, 1.0, 0.0, 1.0), **given)
    runs = tuple(replace(run, measured=(run.measured[0], after)) for run in found.runs)
    document = ablate_document(loaded, replace(found, baseline=(found.baseline[0], plain), runs=runs))
    one = document["runs"][0]
    assert one["delta_interval"]["mc:x.jsonl"] == pytest.approx([-50 - 91.87, -50 + 91.87], rel=5e-3)
    assert [value for name, value in one["delta_interval"].items() if name != "mc:x.jsonl"] == [None]
    panel = next(ax for ax in plot_ablation(document).axes if ax.get_ylabel() == "change of acc, points")
    (bars,) = [one for one in panel.containers if isinstance(one, ErrorbarContainer)]
    ((low, high),) = [(low, high) for (_, low), (_, high) in bars.lines[2][0].get_segments()]
    assert [low, high] == pytest.approx(one["delta_interval"]["mc:x.jsonl"])
    older = {**document, "runs": [{k: v for k, v in run.items() if k != "delta_interval"} for run in document["runs"]]}
    AblateDocument.model_validate(older)
    assert plot_ablation(older).axes


def test_the_caption_names_model_layer_and_text(loaded: Loaded) -> None:
    found = swept(loaded, Sweep((Attack("zero"),), (1,), draws=2))
    caption = plot_ablation(found)._supxlabel.get_text().replace("\n", " ")  # type: ignore[attr-defined] # no getter
    assert Path(loaded.source.name).name in caption
    assert str(Path(loaded.source.name).parent) not in caption
    assert f"layer {found.runs[0].layers[0]}." in caption
    assert "range of 2 random draws" in caption


def test_only_the_document_of_an_ablation_is_drawn() -> None:
    with pytest.raises(BadValue, match=r"schema 'mwtool.scan/2' was given; expected 'mwtool.ablate/1'"):
        plot_ablation({"schema": "mwtool.scan/2"})


def test_an_ablation_shows_itself_in_one_line_and_as_a_table(loaded: Loaded) -> None:
    found = made_up(loaded)
    assert repr(found) == f"Ablation({loaded.source.name!r}, runs=4, tasks=['ppl:x', 'mc:x.jsonl'])"
    assert found._repr_html_().count("<tr>") == 1 + 4 * 2
    assert found.to_dict() == ablate_document(loaded, found)
