"""How LongBench scores answers, from 0 to 1: which metric each dataset has, how long answers are, and the metrics.

Scores are those of its `metrics.py` with `rouge` 1.0.1 and `fuzzywuzzy` 0.18.0, peculiarities included: only then can
they be compared with published ones.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

Score = Callable[[str, str, Sequence[str]], float]
"""Answer, a right answer and the classes of the record to a score."""


def qa_f1(answer: str, right: str, _classes: Sequence[str] = ()) -> float:
    """F1 of the words in common, in lower case without punctuation and articles."""
    one, other = Counter(_words(answer)), Counter(_words(right))
    return _f1((one & other).total(), one.total(), other.total())


def rouge_l(answer: str, right: str, _classes: Sequence[str] = ()) -> float:
    """F1 of distinct words, of which those in common lie on a longest common subsequence of any two sentences.

    Sentences end at every full stop, also at that of a number; one of spaces alone has one empty word.
    """
    one, other = _sentences(answer), _sentences(right)
    common = {word for sentence in other for said in one for word in _subsequence(sentence, said)}
    return _f1(len(common), len(set().union(*one)), len(set().union(*other)))


def classification(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """1 over the number of classes named, if the right one is among them.

    A class whose name is part of the right one's does not count, unless the class named before it was such a one.
    """
    found = [name for name in classes if name in answer]
    at = 0
    while at < len(found):
        if found[at] in right and found[at] != right:
            del found[at]  # what comes next takes its place and is not looked at, as in LongBench
        at += 1
    return 1 / len(found) if right in found else 0.0


def count(answer: str, right: str, _classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the answer that are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def retrieval(answer: str, right: str, _classes: Sequence[str] = ()) -> float:
    """`count` with the number of the right paragraph, which is called `Paragraph N` or `\u6bb5\u843dN`."""
    found = re.search(r"(?:Paragraph |\u6bb5\u843d)(\d+)", right)
    return count(answer, found[1]) if found else 0.0


def code_sim(answer: str, right: str, _classes: Sequence[str] = ()) -> float:
    """How similar the first line of code is, in whole percent; lines with a backtick, `#` or `//` are no code."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, right).ratio()) / 100 if line and right else float(line == right)


@dataclass(frozen=True, slots=True)
class Dataset:
    """How answers to a dataset are made and scored. new_tokens: at most so many. first_line: what follows is cut."""

    metric: str
    new_tokens: int
    first_line: bool = False


METRICS: dict[str, Score] = {
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "code_sim": code_sim,
}
DATASETS = {
    "narrativeqa": Dataset("qa_f1", 128),
    "qasper": Dataset("qa_f1", 128),
    "multifieldqa_en": Dataset("qa_f1", 64),
    "hotpotqa": Dataset("qa_f1", 32),
    "2wikimqa": Dataset("qa_f1", 32),
    "musique": Dataset("qa_f1", 32),
    "gov_report": Dataset("rouge_l", 512),
    "qmsum": Dataset("rouge_l", 512),
    "multi_news": Dataset("rouge_l", 512),
    "trec": Dataset("classification", 64, first_line=True),
    "triviaqa": Dataset("qa_f1", 32, first_line=True),
    "samsum": Dataset("rouge_l", 128, first_line=True),
    "lsht": Dataset("classification", 64, first_line=True),
    "passage_count": Dataset("count", 32),
    "passage_retrieval_en": Dataset("retrieval", 32),
    "passage_retrieval_zh": Dataset("retrieval", 32),
    "lcc": Dataset("code_sim", 64),
    "repobench-p": Dataset("code_sim", 64),
}
"""LongBench's datasets, but for those in Chinese whose metrics count words, which need a segmenter."""
SEGMENTED = ("multifieldqa_zh", "dureader", "vcsum")


def dataset_of(name: str) -> Dataset | None:
    """By its name, also that of LongBench-E (`hotpotqa_e`)."""
    return DATASETS.get(name.removesuffix("_e"))


def score(dataset: Dataset, answer: str, right: Sequence[str], classes: Sequence[str]) -> float:
    """The best score of an answer beside any of the right ones."""
    if dataset.first_line:
        answer = answer.lstrip("\n").partition("\n")[0]
    return max(METRICS[dataset.metric](answer, one, classes) for one in right)


def _words(text: str) -> list[str]:
    plain = "".join(one for one in text.lower() if one not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _sentences(text: str) -> list[list[str]]:
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _subsequence(one: Sequence[str], other: Sequence[str]) -> Iterator[str]:
    """A longest common subsequence, from its end; of several, the one found by giving up words of `other` first."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one, 1):
        for j, against in enumerate(other, 1):
            same = word == against
            table[i][j] = table[i - 1][j - 1] + 1 if same else max(table[i - 1][j], table[i][j - 1])
    i, j = len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            yield one[i - 1]
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1


def _f1(common: int, one: int, other: int) -> float:
    return 2 * common / (one + other) if common else 0.0
