"""The figure of curricula: each curve is p of every step."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import run

from mwtool.errors import BadSyntax, BadValue
from mwtool.macdrop.curriculum import curriculum_of
from mwtool.macdrop.plot import plot_curriculum

SPECS = ("step:0.8", "exp:0.8,alpha=0.05", "epoch-before:0.6")


def test_every_curve_is_p_of_every_step_and_curves_differ_in_grey() -> None:
    (panel,) = plot_curriculum(*SPECS, steps=30, per_epoch=10).axes
    curves = {line.get_label(): line for line in panel.lines if not str(line.get_label()).startswith("_")}
    for spec in SPECS:
        curriculum = curriculum_of(spec)
        assert tuple(map(float, curves[str(curriculum)].get_ydata())) == curriculum.values(30, 10)
    assert len({str(line.get_linestyle()) for line in curves.values()}) == len(SPECS)
    assert len(panel.lines) == len(SPECS) + 2  # and the ends of two epochs


def test_a_file_and_a_curriculum_are_drawn_too(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("phases:\n- {schedule: 'constant:0.5', steps: 4}\n- schedule: none\n")
    (panel,) = plot_curriculum(str(tmp_path / "two.yaml"), curriculum_of("linear:0.9-0.1"), steps=6).axes
    assert list(map(float, panel.lines[0].get_ydata())) == [0.5] * 4 + [0, 0]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(BadValue, match="no curriculum is given"):
        plot_curriculum()
    with pytest.raises(BadSyntax, match="unknown schedule"):
        plot_curriculum("sep:0.8")


def test_the_command_draws_several_and_trains_with_one(tmp_path: Path) -> None:
    given = [word for spec in SPECS for word in ("--macdrop", spec)]
    ran = run("finetune", *given, "--show-curriculum", "--max-steps", 20, "--plot", tmp_path / "p.svg")
    assert (ran.code, ran.out.count("p of ")) == (0, 3)
    assert "exp:0.8,alpha=0.05" in (tmp_path / "p.svg").read_text()
    several = run("finetune", *given, "--data", "x.json", "--dry-run")
    assert (several.code, several.out) == (2, "")
    assert "--macdrop is given 3 times; a run takes one" in " ".join(several.err.split())
    page = run("finetune", "--show-curriculum", "--report", tmp_path / "x.html")
    assert (page.code, (tmp_path / "x.html").exists()) == (2, False)
