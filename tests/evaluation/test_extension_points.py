"""A protocol or a kind of task is one entry of a table: registered here, it works from Python and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import run
from hypothesis import given
from hypothesis import strategies as st
from words import planted_folder

from mwtool.errors import BadValue
from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import evaluate
from mwtool.evaluation.measurement import Measured, OnProgress, mean_of
from mwtool.evaluation.perplexity import measure_perplexity
from mwtool.evaluation.tasks import KINDS, Kind, Task, expected, parse_task, parse_tasks
from mwtool.evaluation.windows import PROTOCOLS, Protocol, Text, Unit, protocol_named, windows
from mwtool.models.load import Loaded, load
from mwtool.surgery.attack import Attack


class Counting:
    """A tokenizer whose text is a number n and whose tokens are 100, 101, ... of them."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(100, 100 + int(text)))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model"))


def scored_tokens(protocol: Protocol, tokens: int, length: int) -> tuple[list[int], list[list[int]]]:
    """The tokens that are scored, in order, and all windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "tried", protocol)
        cut = windows(Counting(), Text((str(tokens),)), "tried", length, 1)  # type: ignore[arg-type]
    pairs = zip(cut.ids, cut.scored, strict=True)
    return [one for ids, last in pairs for one in ids[-last:].tolist()], [ids.tolist() for ids in cut.ids]


@given(
    tokens=st.integers(2, 60),
    length=st.integers(2, 20),
    bos=st.sampled_from(["window", "document", "never"]),
    tail=st.sampled_from(["keep", "drop", "fill"]),
)
def test_every_combination_scores_each_token_once_and_reads_no_more_than_a_window(
    tokens: int, length: int, bos: Any, tail: Any
) -> None:
    scored, cut = scored_tokens(Protocol(bos=bos, tail=tail), tokens, length)
    step = length - (bos == "window")
    stays = tokens if tail != "drop" or tokens < step else tokens // step * step
    everything = range(100, 100 + stays)
    unscored = {*everything[::step]} if bos == "never" else set()
    if tail == "fill" and tokens > step:
        unscored -= {everything[tokens // step * step]} if tokens % step else set()
    assert scored == [token for token in everything if token not in unscored]
    assert all(len(one) <= length + (bos == "document") for one in cut)  # the last token is not an input
    assert [1 in one for one in cut] == [bos == "window" or (bos == "document" and one[0] == 1) for one in cut]
    if tail == "fill" and tokens >= step:
        assert {len(one) for one in cut} == {length + (bos == "document")}


def test_the_four_protocols_cut_as_they_are_described() -> None:
    def cut(name: str) -> list[list[int]]:
        found = windows(Counting(), Text(("7",)), name, 4, 1)  # type: ignore[arg-type]
        return [ids.tolist() for ids in found.ids]

    assert cut("bos") == [[1, 100, 101, 102], [1, 103, 104, 105], [1, 106]]
    assert cut("bos-4096") == [[1, 100, 101, 102], [1, 103, 104, 105]]
    assert cut("sun-4096") == [[100, 101, 102, 103]]
    assert cut("word") == [[1, 100, 101, 102, 103], [102, 103, 104, 105, 106]]


def test_a_new_protocol_works_from_python_and_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexity for each byte: the same summed loss as for each word, divided by something else."""
    byte = Unit("byte", lambda document: len(document.encode()))
    monkeypatch.setitem(PROTOCOLS, "byte", Protocol(bos="document", tail="fill", unit=byte))
    found = {}
    for protocol in ("word", "byte"):
        options = ["--task", f"ppl:{folder / 'text.txt'}", "--window", 16, "--protocol", protocol]
        (found[protocol],) = run("eval", folder, *options, "--json").document["results"]
    assert [one["metric"] for one in found.values()] == ["word_perplexity", "byte_perplexity"]
    text = (folder / "text.txt").read_text()
    assert found["byte"]["weights"] == [len(text.encode())]
    assert found["byte"]["samples"] == found["word"]["samples"]
    assert found["byte"]["value"] == pytest.approx(math.exp(found["byte"]["samples"][0] / len(text.encode())))
    loaded = load(str(folder))
    own = measure_perplexity(loaded.model, loaded.tokenizer, text, protocol="byte", window=16)  # type: ignore[arg-type]
    assert own.value == pytest.approx(found["byte"]["value"])


def test_an_unknown_protocol_is_refused_with_the_most_similar_one(folder: Path) -> None:
    with pytest.raises(BadValue, match=r"^unknown protocol 'bos-409'; did you mean bos-4096\?$"):
        protocol_named("bos-409")
    ran = run("eval", folder, "--protocol", "wrod")
    assert (ran.code, ran.out) == (2, "")
    assert "did you mean word?" in " ".join(ran.err.split())


@dataclass(frozen=True)
class Vocabulary:
    """Measures the size of the vocabulary, in a file's unit."""

    task: Task
    factor: float
    notes: tuple[str, ...] = ("a note",)

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        values = [self.factor * loaded.base.config.vocab_size] * (options.limit or 1)
        return [Measured(task=str(self.task), seconds=0.0, **mean_of("size", values))]


def test_a_new_kind_of_task_works_from_python_and_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(task: Task) -> None:
        if not Path(task.target).exists():
            raise BadValue(f"{task}: there is no such file")

    def prepare(_loaded: Loaded, task: Task, _options: Options) -> Vocabulary:
        return Vocabulary(task, float(Path(task.target).read_text()))

    with pytest.raises(BadValue, match="unknown task 'vocabulary:x'"):
        parse_task("vocabulary:x")
    monkeypatch.setitem(KINDS, "vocabulary", Kind("vocabulary:FILE", check, prepare))
    assert "vocabulary:FILE" in expected()
    (tmp_path / "factor").write_text("2")
    name = f"vocabulary:{tmp_path / 'factor'}"
    (found,) = run("eval", folder, "--task", name, "--limit", 3, "--json").document["results"]
    loaded = load(str(folder))
    size = 2 * loaded.base.config.vocab_size
    assert (found["task"], found["metric"], found["value"], found["n"]) == (name, "size", size, 3)
    notes: list[str] = []
    (own,) = evaluate(loaded, None, [Attack()], parse_tasks([name]), on_note=notes.append)
    assert (own.measured.value, notes) == (size, ["a note"])
    assert run("eval", folder, "--task", "vocabulary:absent").fault == "vocabulary:absent: there is no such file"
