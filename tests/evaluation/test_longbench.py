"""LongBench's records: scores computed by hand, prompts cut in the middle, files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import run

from mwtool.errors import BadValue
from mwtool.evaluation.longbench import _cut, read_longbench
from mwtool.evaluation.longbench_scores import DATASETS, METRICS, score

QA: dict[str, Any] = {"dataset": "hotpotqa", "context": "It rained. " * 9, "input": "Did it rain?", "answers": ["Yes"]}


def written(folder: Path, *records: dict[str, Any]) -> Path:
    file = folder / "long.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return file


THEIRS: list[tuple[str, str, str, tuple[str, ...], float]] = [
    ("qa_f1", "The red, red car!", "a red car", (), 0.8),  # red red car | red car
    ("qa_f1", "bus", "car", (), 0),
    ("qa_f1", "the", "car", (), 0),
    ("rouge_l", "a b c d", "a c e d", (), 0.75),  # a c d
    ("rouge_l", "b a", "a b b", (), 0.5),  # of two distinct words one
    ("rouge_l", "", "a", (), 0),
    ("rouge_l", "...", "yes", (), 0),
    ("rouge_l", "yes. ", "yes", (), 2 / 3),  # the blank after the full stop is a word
    ("rouge_l", "the cat and the dog and the bird", "the dog and the cat", (), 2 / 3),
    ("rouge_l", "one two three four five", "five one four two three. two one", (), 0.6),
    (
        "rouge_l",
        "The dam broke. Water rose by 3.5 feet. No one was hurt.",
        "Water rose 3 feet after the dam broke. No one was hurt. ",
        (),
        0.7692307642307693,
    ),
    ("classification", "Type: city or food", "city", ("city", "food", "river"), 0.5),
    ("classification", "other city", "other city", ("city", "other city", "food"), 1),
    ("classification", "other big river", "other big river", ("other", "big", "river", "other big river"), 0.5),
    ("classification", "big river and other big", "other big river", ("big", "other", "other big river"), 0),
    ("classification", "food", "city", ("city", "food"), 0),
    ("count", "There are 7, not 8 or 9", "7", (), 1 / 3),
    ("count", "none", "7", (), 0),
    ("retrieval", "Paragraph 15 and 3", "Paragraph 15", (), 0.5),
    ("retrieval", "\u6bb5\u843d4", "\u6bb5\u843d4", (), 1),
    ("code_sim", "```\n# no\nabcd\nnext", "abxd", (), 0.75),
    ("code_sim", "\n    return x + 1\nprint()", "    return x + 2", (), 0.94),
    ("code_sim", "  \nreturn x", "return x", (), 0.2),  # a line of blanks is the first line
    ("code_sim", "value = " + 40 * "abcdef", "value = " + 40 * "abcdeg", (), 0.05),
    ("code_sim", "// only a remark", "x", (), 0),
    ("code_sim", "", "", (), 1),
]
"""What LongBench's metrics.py, of January 2025, computes with rouge 1.0.1, fuzzywuzzy 0.18.0 and jieba 0.42.1."""


@pytest.mark.parametrize(("metric", "answer", "right", "classes", "expected"), THEIRS)
def test_metrics_are_those_that_longbench_computes(
    metric: str, answer: str, right: str, classes: tuple[str, ...], expected: float
) -> None:
    # Theirs add 1e-8 to a denominator.
    assert METRICS[metric](answer, right, classes) == pytest.approx(expected, abs=1e-8)


def test_the_best_right_answer_counts_and_of_few_shot_answers_the_first_line() -> None:
    assert score(DATASETS["hotpotqa"], " car\n", ["bus", "car"], ()) == 1
    assert score(DATASETS["triviaqa"], "\ncar\nPassage: bus bus", ["car"], ()) == 1
    assert score(DATASETS["hotpotqa"], "car\nbus", ["car"], ()) == pytest.approx(2 / 3)


def test_prompts_lose_their_middle() -> None:
    assert _cut(tuple(range(10)), 10) == tuple(range(10))
    assert _cut(tuple(range(10)), 5) == (0, 1, 8, 9)


def test_a_record_brings_its_prompt_or_has_the_context_before_the_question(tmp_path: Path) -> None:
    (plain, own) = read_longbench(
        written(tmp_path, QA, {**QA, "context": "{input}", "prompt": "Q {input} C {context}"})
    )
    assert plain.prompt == f"{QA['context']}\n\nDid it rain?\n"
    assert own.prompt == "Q Did it rain? C {input}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "hotpot"}, r"unknown dataset .*hotpot.*hotpotqa"),
        ({"dataset": "vcsum"}, "vcsum is scored by Chinese words, which need a segmenter"),
        ({"dataset": None}, "unknown dataset"),
        ({"answers": "Yes"}, "answers is .*; expected a list of strings"),
        ({"answers": []}, "answers is .*; expected a list of strings"),
        ({"context": 3}, "context is 3; expected a non-empty string"),
        ({"dataset": "trec"}, "all_classes is .*; expected a list of strings"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue, match=f"line 2: {said}"):
        read_longbench(written(tmp_path, QA, {**QA, **change}))


def test_the_command_scores_each_dataset_under_attack_and_keeps_answers(tmp_path: Path) -> None:
    count = {**QA, "dataset": "passage_count", "answers": ["2"]}
    file = written(tmp_path, *[QA] * 4, count, count)
    task = f"longbench:{file}"
    ran = run(
        "eval", "--task", task, "--attack", "none", "--attack", "zero:3", "--window", 8, "--device", "cpu", "--json"
    )
    assert ran.code == 0
    assert "6 prompts are longer than 8 tokens and lose their middle" in ran.err
    found = ran.document["results"]
    shape = [(one["attack"], one["part"], one["metric"], one["n"], len(one["answers"])) for one in found]
    assert shape == [
        (attack, part, metric, n, n)
        for attack in ("none", "zero:3")
        for part, metric, n in (("hotpotqa", "qa_f1", 4), ("passage_count", "count", 2))
    ]
    for one in found:
        dataset = DATASETS[one["part"]]
        pairs = zip(one["answers"], one["setting"]["references"], strict=True)
        assert one["samples"] == [score(dataset, answer, right, ()) for answer, right in pairs]
        assert one["value"] == pytest.approx(sum(one["samples"]) / one["n"])
    assert {one["digest"] for one in found if one["part"] == "hotpotqa"} == {found[0]["digest"]}


def test_answers_are_shown_below_the_questions_of_their_own_dataset(tmp_path: Path) -> None:
    file = written(tmp_path, QA, QA, {**QA, "dataset": "passage_count", "input": "How many?", "answers": ["2"]})
    page = tmp_path / "page.html"
    ran = run("eval", "--task", f"longbench:{file}", "--window", "8", "--device", "cpu", "--report", page)
    assert ran.code == 0
    shown = [line for line in ran.out.splitlines() if ", prompt " in line]
    assert [line.partition(".jsonl ")[2] for line in shown] == [
        "hotpotqa, prompt 1: Did it rain?",
        "hotpotqa, prompt 2: Did it rain?",
        "passage_count, prompt 1: How many?",
    ]
    assert "passage_count" in page.read_text(encoding="utf-8")


def test_a_missing_file_is_one_line_before_a_model_is_opened(tmp_path: Path) -> None:
    assert (
        "absent.jsonl" in run("eval", tmp_path / "no-model", "--task", f"longbench:{tmp_path / 'absent.jsonl'}").fault
    )
