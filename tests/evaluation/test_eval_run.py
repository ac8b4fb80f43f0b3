"""Evaluations from Python: kept up to date in a file, resumed from it, and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from words import planted_folder

from mwtool.errors import BadValue
from mwtool.evaluation.config import EvalConfig, Options
from mwtool.evaluation.run import evaluate_models
from mwtool.scan.settings import Choice


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(folder: Path) -> EvalConfig:
    return EvalConfig(
        tasks=(f"ppl:{folder / 'text.txt'}",), attacks=("none", "zero:2"), measuring=Options(window=16, limit=4)
    )


def test_an_interrupted_evaluation_is_resumed_and_measures_only_what_is_missing(
    folder: Path, config: EvalConfig, tmp_path: Path
) -> None:
    output = tmp_path / "eval.json"
    begun: list[str] = []

    def stopping(_done: int, _total: int, name: str) -> Callable[[int, int], None] | None:
        if begun:
            raise KeyboardInterrupt
        begun.append(name)
        return None

    with pytest.raises(KeyboardInterrupt):
        evaluate_models([str(folder)], config, output=output, on_task=stopping)
    before = json.loads(output.read_text())
    assert (before["complete"], [one["attack"] for one in before["results"]]) == (False, ["none"])
    resumed: list[str] = []
    found = evaluate_models(
        [str(folder)], config, output=output, resume=True, on_task=lambda _done, _total, name: resumed.append(name)
    )
    assert [name.partition(",")[0] for name in resumed] == ["zero:2"]
    (document,) = found.documents
    assert document == json.loads(output.read_text())
    assert document["complete"]
    assert document["results"][0] == before["results"][0]
    plain = evaluate_models([str(folder)], config)
    assert [row.measured.samples for row in plain.entries] == [row.measured.samples for row in found.entries]


def test_a_model_is_compared_with_a_saved_result(folder: Path, config: EvalConfig, tmp_path: Path) -> None:
    saved = tmp_path / "first.json"
    evaluate_models([str(folder)], replace(config, attacks=("none",)), output=saved)
    both = evaluate_models([str(saved), str(folder)], config, compare=True)
    assert both.names == ("first", str(folder))
    same, attacked = both.compared()["pairs"]
    assert (same["value"], same["beside"]) == (1.0, {"model": "first", "attack": "none"})
    assert attacked["attack"] == "zero:2"
    assert attacked["value"] != 1.0


@pytest.mark.parametrize(
    ("models", "keywords", "message"),
    [
        ([], {}, "no model is given"),
        (["demo", "./other"], {}, "2 models are given"),
        (["demo"], {"resume": True}, "resume needs an output file"),
    ],
)
def test_contradicting_settings_are_refused_before_a_model_is_opened(
    models: list[str], keywords: dict[str, bool], message: str
) -> None:
    with pytest.raises(BadValue, match=message):
        evaluate_models(models, **keywords)  # type: ignore[arg-type]


def test_saved_rows_belong_to_one_model(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="belong to one model"):
        evaluate_models(["demo", "./other"], EvalConfig(choice=Choice(file=tmp_path / "scan.json")), compare=True)
