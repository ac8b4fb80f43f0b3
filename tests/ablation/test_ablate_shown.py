"""An ablation as it is shown: its document, its table, its figure."""

from __future__ import annotations

import io
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from rich.console import Console
from sweeps import measured, swept
from words import opened, planted, with_tokenizer

from mwtool.ablation.document import ablate_document
from mwtool.ablation.plot import _curves, plot_ablation
from mwtool.ablation.report import ablate_report
from mwtool.ablation.sweep import Ablation, Run, Sweep
from mwtool.evaluation.measurement import Measured
from mwtool.models.load import Loaded
from mwtool.scan.targets import Choice, Target
from mwtool.surgery.attack import Attack, parse_mode


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return planted(tmp_path_factory.mktemp("planted"))


def accuracy(value: float) -> Measured:
    return Measured("mc:x.jsonl", "acc", value, None, 4, 0.0, (1.0, 0.0))


def made_up(loaded: Loaded) -> Ablation:
    """A perplexity and an accuracy, under one attack, two random controls and the rows of largest norm."""
    target, attack = Target(1, loaded.layers[1].ffns[0], (17, 3)), Attack("zero", 1)
    plain = [3.0, 4.0, 5.0, 6.0, 2.0]
    counts = [1.0] * 5

    def run(control: str | None, more: float, right: float) -> Run:
        found = (measured([x + more for x in plain], counts), accuracy(right))
        return Run(attack=attack, control=control, targets=(target,), rows=((17,),), measured=found)

    runs = (run(None, 0.5, 0.25), run("random:0", 0.1, 0.5), run("random:1", 0.3, 0.75), run("norm", 0.2, 0.5))
    return Ablation((measured(plain, counts), accuracy(0.5)), runs, (), ())


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
        plot_ablation(swept(loaded, Sweep(ks=(1,), draws=1), choice), tmp_path / "curve.svg")
        assert (tmp_path / "curve.svg").read_text().count("random rows") == 2
        (tmp_path / "curve.svg").unlink()


def test_several_layers_are_drawn_over_the_layers(loaded: Loaded) -> None:
    from matplotlib import pyplot as plt

    found = swept(loaded, Sweep((Attack("zero"),), (1, 2), draws=0), Choice(each_layer=True))
    _, panel = plt.subplots()
    _curves(panel, found, found.baseline[0].task)
    lines = {str(line.get_label()): line for line in panel.lines}
    axis = panel.get_xlabel()
    plt.close("all")
    assert axis == "layer"
    for k in (1, 2):
        values = [run.measured[0].value for run in found.runs if run.attack.k == k]
        expected = [value / found.baseline[0].value for value in values]
        assert list(lines[f"zero:{k}"].get_xdata()) == list(range(tiny.LAYERS))
        assert list(lines[f"zero:{k}"].get_ydata()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("more", "scale"), [(0.5, "linear"), (3.0, "log"), (6.0, "log")])
def test_ratios_over_more_than_a_decade_have_a_log_axis(loaded: Loaded, more: float, scale: str) -> None:
    """Of 20 and of 400 times the perplexity: the larger the ratio, the further below zero a linear axis begins."""
    from matplotlib import pyplot as plt

    found = made_up(loaded)
    plain = found.baseline[0]
    assert plain.weights is not None
    attacked = measured([x + more for x in plain.samples], list(plain.weights))
    first = replace(found.runs[0], measured=(attacked, found.runs[0].measured[1]))
    _, panel = plt.subplots()
    _curves(panel, replace(found, runs=(first, *found.runs[1:])), "ppl:x")
    drawn = panel.get_yscale()
    plt.close("all")
    assert drawn == scale


def test_the_curves_of_an_accuracy_are_points(loaded: Loaded) -> None:
    from matplotlib import pyplot as plt

    _, panel = plt.subplots()
    _curves(panel, made_up(loaded), "mc:x.jsonl")
    own, random, norm, zero = [list(line.get_ydata()) for line in panel.lines]
    label = panel.get_ylabel()
    plt.close("all")
    assert (own, random, norm, set(zero)) == ([-25.0], [12.5], [0.0], {0})
    assert "points" in label


def test_the_legend_hides_no_curve(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its box lies beside the axes, whatever is drawn in them."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_options: drawn.append(figure))
    modes = tuple(map(parse_mode, ("zero", "retain", "mean", "scale:0.5")))
    plot_ablation(swept(loaded, Sweep(modes, (0, 1, 3), draws=2)), tmp_path / "curve.png")
    (panel,) = drawn[0].axes
    legend = panel.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == len(panel.lines) - 1 == 12
    assert legend.get_window_extent().x0 >= panel.get_window_extent().x1


def test_the_curves_are_the_ratios_over_k(loaded: Loaded) -> None:
    from matplotlib import pyplot as plt

    found = swept(loaded, Sweep((Attack("retain"),), (0, 1, 3), draws=2))
    _, panel = plt.subplots()
    _curves(panel, found, found.baseline[0].task)
    own, random, norm, one = panel.lines
    plt.close("all")
    ratios = {(run.attack.k, run.control): run.measured[0].value / found.baseline[0].value for run in found.runs}
    assert list(own.get_xdata()) == [0, 1, 3]
    assert list(own.get_ydata()) == pytest.approx([ratios[k, None] for k in (0, 1, 3)], rel=1e-9)
    means = [(ratios[k, "random:0"] + ratios[k, "random:1"]) / 2 for k in (1, 3)]
    assert list(random.get_ydata()) == pytest.approx(means, rel=1e-9)
    assert list(norm.get_ydata()) == pytest.approx([ratios[k, "norm"] for k in (1, 3)], rel=1e-9)
    assert set(one.get_ydata()) == {1}
