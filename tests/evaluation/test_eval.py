"""What is measured is what a plain loop gives: questions, the harness's own tasks, answers, attacks, pairs."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from questions import CHOICES, CLOZE, OPTIONS, rows, words
from words import adding_bos, perplexity_of, planted, text_of

from mwtool.ablation.sweep import Sweep, ablate
from mwtool.demo import questions
from mwtool.errors import BadValue, ModelNotFound
from mwtool.evaluation import harness
from mwtool.evaluation import questions as local
from mwtool.evaluation.comparison import Entry, compare_with_first, paired, student_t
from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import check, evaluate, measure
from mwtool.evaluation.measurement import Measured
from mwtool.evaluation.tasks import Task, parse_tasks
from mwtool.models.load import Loaded
from mwtool.models.source import DEMO
from mwtool.scan.loaded import massive_for
from mwtool.scan.settings import Choice, Settings
from mwtool.scan.targets import find_targets
from mwtool.surgery.attack import parse_attack


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return planted(tmp_path_factory.mktemp("model"))


def likelihood(loaded: Loaded, context: str, continuation: str) -> float:
    """ln p of the continuation after bos and the context, in float64."""
    tokenizer: Any = loaded.tokenizer
    before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (context, continuation))
    ids = torch.tensor([[tiny.BOS, *before, *after]])
    with torch.no_grad():
        likely = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
    return float(likely[:-1].gather(1, ids[0, 1:, None])[-len(after) :].sum())


@pytest.mark.parametrize("found", [CHOICES, OPTIONS], ids=["choices", "context_options"])
def test_accuracies_are_those_of_a_plain_loop(loaded: Loaded, tmp_path: Path, found: list[dict[str, Any]]) -> None:
    plain, normed = [], []
    for row in found:
        pairs = [(row["query"], one) for one in row["choices"]] if "query" in row else (
            [(one, row["continuation"]) for one in row["context_options"]]
        )  # fmt: skip
        each = [likelihood(loaded, *pair) for pair in pairs]
        scaled = [value / len(ending) for value, (_, ending) in zip(each, pairs, strict=True)]
        plain.append(float(each.index(max(each)) == row["gold"]))
        normed.append(float(scaled.index(max(scaled)) == row["gold"]))
    acc, acc_norm = measure(loaded, [rows(tmp_path, "mc", found)], Options(batch_size=4))
    assert [acc.metric, acc_norm.metric] == ["acc", "acc_norm"]
    assert acc.samples == tuple(plain)
    assert acc_norm.samples == tuple(normed)
    assert acc.value == statistics.fmean(plain)
    assert acc.stderr == pytest.approx(statistics.stdev(plain) / math.sqrt(len(plain)))
    assert len({*plain, *normed}) == 2  # some right, some wrong: the test could fail


def test_a_cloze_is_its_greedy_accuracy_and_the_perplexity_of_what_is_true(loaded: Loaded, tmp_path: Path) -> None:
    acc, perplexity = measure(loaded, [rows(tmp_path, "cloze", CLOZE)])
    expected = [-likelihood(loaded, row["context"], row["continuation"]) for row in CLOZE]
    assert perplexity.samples == pytest.approx(expected, rel=1e-5)
    assert perplexity.value == pytest.approx(math.exp(statistics.fmean(expected)), rel=1e-5)
    assert (acc.n, acc.metric, perplexity.higher_is_better) == (9, "acc", False)


def test_a_delimiter_stands_between_and_only_its_last_whitespace_is_scored() -> None:
    row = local.Cloze("one", "two")
    assert local._pairs(row, "\nAnswer: ") == [("one\nAnswer:", " two")]
    assert local._pairs(row, " ") == [("one", " two")]


def seen_by(loaded: Loaded) -> tuple[list[torch.Tensor], Any]:
    seen: list[torch.Tensor] = []
    hook = loaded.base.get_input_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    return seen, hook


@pytest.mark.parametrize("adds", ["nothing", "bos"])
def test_bos_stands_once_in_front_of_every_context_and_the_batch_size_is_the_one_given(
    loaded: Loaded, tmp_path: Path, adds: str
) -> None:
    told = replace(loaded, tokenizer=adding_bos(loaded.tokenizer) if adds == "bos" else loaded.tokenizer)
    starting = [{**row, "query": f"<s> {row['query']}"} for row in CHOICES[:3]]  # the text itself begins with it
    tasks = [rows(tmp_path, "mc", CHOICES + starting), rows(tmp_path, "cloze", CLOZE), prompts(tmp_path)]
    seen, hook = seen_by(loaded)
    try:
        measure(told, tasks, Options(batch_size=5, new_tokens=2))
    finally:
        hook.remove()
    first = [ids for ids in seen if ids.shape[1] > 1]  # answers go on a token at a time
    assert {int((row == tiny.BOS).sum()) for ids in first for row in ids} == {1}
    padding = torch.tensor([0, 2])
    assert {int(row[~torch.isin(row, padding)][0]) for ids in first for row in ids} == {tiny.BOS}
    assert max(len(ids) for ids in seen) == 5
    assert [len(ids) for ids in first].count(5) >= 8


def test_a_context_that_is_too_long_loses_what_follows_bos_and_that_is_counted(loaded: Loaded, tmp_path: Path) -> None:
    task = rows(tmp_path, "cloze", [{"context": words(1, 40), "continuation": words(2, 2)}])
    seen, hook = seen_by(loaded)
    try:
        (_, perplexity) = measure(loaded, [task], Options(window=16))
    finally:
        hook.remove()
    assert seen[0].shape == (1, 16)
    assert seen[0][0, 0] == tiny.BOS
    assert perplexity.setting["shortened"] == 1
    kept = " ".join(words(1, 40).split()[-14:])
    assert perplexity.samples[0] == pytest.approx(-likelihood(loaded, kept, words(2, 2)), rel=1e-5)


def prompts(folder: Path) -> Task:
    texts = [("<s> " if n == 6 else "") + words(n, 2 + n % 3) for n in range(7)]
    (folder / "prompts.txt").write_text("\n".join(texts) + "\n")
    return Task("generate", str(folder / "prompts.txt"))


def test_answers_are_those_of_greedy_decoding_one_prompt_at_a_time(loaded: Loaded, tmp_path: Path) -> None:
    tokenizer: Any = loaded.tokenizer
    (found,) = measure(loaded, [task := prompts(tmp_path)], Options(new_tokens=6, batch_size=3))
    for prompt, answer in zip(Path(task.target).read_text().splitlines(), found.answers, strict=True):
        ids = [tiny.BOS, *tokenizer(prompt.removeprefix("<s> "), add_special_tokens=False).input_ids]
        said: list[int] = []
        with torch.no_grad():
            for _ in range(6):
                logits = loaded.model(input_ids=torch.tensor([ids + said])).logits[0, -1]
                said.append(int(logits.argmax()))
        ended = said[: said.index(2)] if 2 in said else said
        assert answer == tokenizer.decode(ended, skip_special_tokens=True)
    assert found.n == 7
    assert found.setting["prompts"] == Path(task.target).read_text().splitlines()


def test_an_attacked_evaluation_gives_what_ablate_gives_and_leaves_the_model_as_it_was(loaded: Loaded) -> None:
    before, tasks, options = tiny.digest(loaded.base), parse_tasks([text_of(loaded)]), Options(window=16)
    targets, _ = find_targets(loaded, Choice(), 3, Settings())
    swept = ablate(loaded, targets, tasks, Sweep(ks=(3,), draws=0), options)
    massive, _ = massive_for(loaded, settings=Settings(k=3))
    attacks = tuple(map(parse_attack, ("none", "zero:3", "retain:3")))
    plain, zeroed, retained = evaluate(loaded, massive, attacks, tasks, options)
    assert plain.measured.value == swept.baseline[0].value == pytest.approx(perplexity_of(loaded), rel=1e-6)
    assert [zeroed.measured.samples, retained.measured.samples] == [run.measured[0].samples for run in swept.runs]
    assert zeroed.measured.value != plain.measured.value
    assert tiny.digest(loaded.base) == before


def test_what_cannot_be_attacked_is_refused_before_anything_runs(loaded: Loaded) -> None:
    tasks, seen = parse_tasks([text_of(loaded)]), []
    hook = loaded.base.register_forward_pre_hook(lambda *_: seen.append(1))
    massive, _ = massive_for(loaded, settings=Settings(k=3))
    seen.clear()
    try:
        for name, words_ in (("zero:4", "needs 4 ranked rows"), ("mean:2", "`mwtool ablate` measures")):
            with pytest.raises(BadValue, match=words_):
                evaluate(loaded, massive, (parse_attack("none"), parse_attack(name)), tasks)
        with pytest.raises(BadValue, match="no massive weights to attack with zero:1"):
            evaluate(loaded, None, (parse_attack("zero:1"),), tasks)
    finally:
        hook.remove()
    assert seen == []


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tasks of the harness whose data are local files: two of choices in a group, a rolling one, a generating one."""
    from lm_eval.tasks import TaskManager

    def task(name: str, found: list[dict[str, Any]], **more: Any) -> None:
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in found))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.json")}}}
        made = {"task": name, **data, "test_split": "test", "metadata": {"version": 1}, **more}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(made))

    choosing = {"output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices"}
    choosing |= {"doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    task("first", CHOICES[:6], **choosing)
    task("second", CHOICES[6:], **choosing)
    texts = [{"text": words(n, 20 + n)} for n in range(4)]
    metrics = [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]
    task(
        "rolling", texts, output_type="loglikelihood_rolling", doc_to_target="text", doc_to_text="", metric_list=metrics
    )
    generating = {"generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]}, "metric_list": [{"metric": "exact_match"}]}
    task(
        "saying", CLOZE, output_type="generate_until", doc_to_text="context", doc_to_target="continuation", **generating
    )
    group = {"group": "both", "task": ["first", "second"], "metadata": {"version": 2}}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda: manager)
    return tmp_path


def test_a_task_of_the_harness_gives_what_the_same_rows_give_as_a_file(loaded: Loaded, own_tasks: Path) -> None:
    found = {(one.part, one.metric): one for one in measure(loaded, [Task("harness", "both")], Options(batch_size=3))}
    acc, norm = measure(loaded, [rows(own_tasks, "mc", CHOICES)])
    assert found["first", "acc"].samples + found["second", "acc"].samples == acc.samples
    assert found["first", "acc_norm"].samples + found["second", "acc_norm"].samples == norm.samples
    assert found[None, "acc"].value == pytest.approx(acc.value)
    assert found["first", "acc"].stderr is not None
    again = measure(loaded, [Task("harness", "first")], Options(limit=2))
    assert [one.n for one in again] == [2, 2]
    assert (again[0].part, again[0].samples) == (None, acc.samples[:2])
    assert again[0].setting["shots"] == 0


def test_the_harnesss_rolling_perplexity_is_ours_by_words(loaded: Loaded, own_tasks: Path) -> None:
    seen, hook = seen_by(loaded)
    try:
        word, bits = measure(loaded, [Task("harness", "rolling")], Options(window=16))
    finally:
        hook.remove()
    (own_tasks / "same.jsonl").write_text("".join(json.dumps({"text": words(n, 20 + n)}) + "\n" for n in range(4)))
    (ours,) = measure(loaded, parse_tasks([f"ppl:{own_tasks / 'same.jsonl'}"]), Options(window=16, protocol="word"))
    assert (word.metric, bits.metric, ours.metric) == ("word_perplexity", "bits_per_byte", "word_perplexity")
    assert word.value == pytest.approx(ours.value, rel=1e-5)
    assert word.samples == pytest.approx(ours.samples, rel=1e-5)
    assert word.weights == ours.weights
    assert {int((row == tiny.BOS).sum()) for ids in seen for row in ids} == {0, 1}
    assert sum(int((row == tiny.BOS).sum()) for ids in seen for row in ids) == 4  # once a document


def test_a_generating_task_runs_in_batches_with_bos_in_front_and_no_bars(
    loaded: Loaded, own_tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, int]] = []
    (ready,) = prepared(loaded, "saying")
    seen, hook = seen_by(loaded)
    capsys.readouterr()
    try:
        (found,) = ready.run(loaded, Options(batch_size=4), lambda done, total: told.append((done, total)))
    finally:
        hook.remove()
    assert [len(ids) for ids in seen if ids.shape[1] > 1] == [4, 4, 1]
    assert {int((row == tiny.BOS).sum()) for ids in seen if ids.shape[1] > 1 for row in ids} == {1}
    assert told == [(4, 9), (8, 9), (9, 9)]
    assert (found.metric, found.n) == ("exact_match", 9)
    assert "it/s" not in capsys.readouterr().err


def prepared(loaded: Loaded, *names: str) -> list[harness.Named]:
    return [harness.prepare_harness(loaded, Task("harness", name), Options()) for name in names]


def test_what_is_no_number_is_named_in_every_kind_of_task(tmp_path: Path, own_tasks: Path) -> None:
    broken = planted(tmp_path / "broken")
    token = int(broken.tokenizer("w11").input_ids[0])  # type: ignore[misc]
    broken.base.get_input_embeddings().weight.data[token] = math.nan
    named = [Task("harness", "first"), rows(tmp_path, "mc", CHOICES), rows(tmp_path, "cloze", CLOZE), prompts(tmp_path)]
    for one in measure(broken, named, Options(new_tokens=8)):
        assert one.nonfinite is not None, one
        assert "have no finite loss, the first is number" in one.nonfinite
        assert one.stderr is None
        assert math.isnan(one.value)


def test_a_task_that_is_not_known_offers_the_nearest_and_data_that_cannot_be_had_the_local_way(
    loaded: Loaded, own_tasks: Path
) -> None:
    with pytest.raises(BadValue, match="has no task 'frist'; did you mean first"):
        check([Task("harness", "frist")])
    with pytest.raises(BadValue, match="has no task 'zzzzzz'; `lm-eval ls tasks` lists"):
        check([Task("harness", "zzzzzz")])
    (own_tasks / "first.json").unlink()
    with pytest.raises(ModelNotFound, match=r"could not be loaded .*; use a local file with mc:FILE.jsonl or"):
        prepared(loaded, "first")
    (own_tasks / "first.json").write_text("nonsense")
    with pytest.raises(ModelNotFound, match="the dataset of first could not be loaded"):
        prepared(loaded, "first")


def test_a_harness_that_gives_up_is_one_line(loaded: Loaded, own_tasks: Path) -> None:
    (ready,) = prepared(loaded, "saying")
    with pytest.raises(BadValue, match="saying: lm-evaluation-harness failed: Invalid configuration: requested max"):
        ready.run(loaded, Options(window=3))


def test_without_lm_eval_local_files_are_measured_and_the_message_says_what_to_install(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BadValue, match=r"needs lm-evaluation-harness; install it with pip install 'mwtool\[eval\]'"):
        check([Task("harness", "arc_easy")])
    files = [
        Task("ppl", "demo"),
        prompts(tmp_path),
        rows(tmp_path, "mc", CHOICES),
        rows(tmp_path, "cloze", CLOZE),
    ]
    check(files)
    assert len(measure(loaded, files[2:], Options(limit=2))) == 4


def test_a_continuation_without_tokens_or_with_too_many_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    long = rows(tmp_path, "cloze", [*CLOZE[:2], {"context": words(1, 3), "continuation": words(1, 17)}])
    with pytest.raises(BadValue, match="question 3: a continuation has 17 tokens; expected at least 1 and at most"):
        measure(loaded, [long], Options(window=16))
    none = rows(tmp_path, "cloze", [{"context": words(1, 3), "continuation": " "}])
    with pytest.raises(BadValue, match="question 1: a continuation has 0 tokens; expected at least 1"):
        measure(loaded, [none], Options(delimiter=""))


def figure(samples: list[float], weights: list[float] | None = None, digest: str = "d") -> Measured:
    n = len(samples)
    kept = None if weights is None else tuple(weights)
    value = sum(samples) / n if weights is None else math.exp(sum(samples) / sum(weights))
    return Measured(
        task="t",
        metric="m",
        value=value,
        stderr=None,
        n=n,
        seconds=0.0,
        samples=tuple(samples),
        weights=kept,
        digest=digest,
    )


def test_accuracies_of_the_same_questions_differ_by_points_with_a_paired_interval() -> None:
    one, other = [1.0, 0, 1, 1, 0, 1], [0.0, 0, 1, 0, 0, 1]
    found = paired(figure(one), figure(other))
    assert found is not None
    differences = [100 * (a - b) for a, b in zip(one, other, strict=True)]
    half = student_t(5) * statistics.stdev(differences) / math.sqrt(6)
    assert (found.kind, found.n) == ("points", 6)
    assert [found.value, found.low, found.high] == pytest.approx([100 / 3, 100 / 3 - half, 100 / 3 + half])
    scores = paired(figure([0.5, 2.5, 1.0]), figure([0.5, 1.5, 1.0]))
    assert scores is not None
    assert (scores.kind, scores.value, scores.low) == ("difference", pytest.approx(1 / 3), None)


def test_perplexities_of_the_same_windows_are_a_ratio() -> None:
    found = paired(figure([4.0, 6, 5, 7], [2.0, 2, 2, 2]), figure([2.0, 4, 3, 5], [2.0, 2, 2, 2]))
    assert found is not None
    assert (found.kind, found.value) == ("ratio", pytest.approx(math.e))
    assert [found.low, found.high] == pytest.approx([math.e, math.e])  # every window differs by the same


def test_other_examples_other_weights_and_what_is_not_finite_are_not_paired() -> None:
    one = figure([1.0, 0, 1])
    assert paired(one, figure([1.0, 0, 1], digest="other")) is None
    assert paired(one, replace(one, digest=None)) is None
    assert paired(one, replace(one, nonfinite="so it is")) is None
    assert paired(one, replace(one, metric="other")) is None
    assert paired(figure([1.0, 2], [1.0, 1]), figure([1.0, 2], [1.0, 2])) is None


def test_every_figure_stands_beside_the_first_of_its_kind() -> None:
    a, b = figure([1.0, 0, 1, 1]), figure([1.0, 1, 1, 1])
    several = [Entry("x", "none", a), Entry("x", "zero:3", b), Entry("y", "none", replace(b, metric="other"))]
    found = list(compare_with_first([*several, Entry("y", "none", a)]))
    assert [(row.model, row.attack, reference.model) for row, reference, _ in found] == [
        ("x", "zero:3", "x"),
        ("y", "none", "x"),
    ]


def test_the_bundled_questions_are_made_of_the_bundled_text() -> None:
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    for name, made in (("mc", questions.choices(text)), ("cloze", questions.cloze(text))):
        assert [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()] == made
    golds = [row["gold"] for row in questions.choices(text)]
    assert {golds.count(at) for at in range(4)} <= set(range(35, 70))  # no place is right more often than by chance
