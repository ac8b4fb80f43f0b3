"""Documents that are read again: written and read with one model, and whatever was done to them, refused or right."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from command import run
from words import planted_folder

from mwtool.ablation.schema import AblateDocument
from mwtool.errors import BadValue
from mwtool.evaluation.document import earlier_results, entries_of, read_documents
from mwtool.evaluation.report import eval_report
from mwtool.files.document import text_of
from mwtool.files.schema import Strict, read_document
from mwtool.finetune import checkpointing
from mwtool.finetune.checkpointing import MARK, newest
from mwtool.finetune.document import read_record
from mwtool.finetune.schema import PlanDocument
from mwtool.massive import Identity, load_massive
from mwtool.quantization.schema import QuantizeDocument
from mwtool.report.page import page_of, read_for_page

MUTATIONS = 1000
KINDS = ("scan", "eval", "comparison", "ablate", "quantize-check", "plan", "finetune", "mark")
ALONE: dict[str, type[Strict]] = {"quantize-check": QuantizeDocument, "plan": PlanDocument}
"""What no command reads."""
DRAWN = 3
"""How many of the mutated documents of a kind are drawn as a page, which takes most of a second."""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One of each kind, as the commands write them."""
    work = tmp_path_factory.mktemp("documents")
    model = planted_folder(work / "model", num_hidden_layers=4)
    (work / "t.txt").write_text(" ".join(f"w{n % 40 + 3}" for n in range(400)))
    (work / "c.jsonl").write_text('{"context": "w3 w4", "continuation": "w5"}\n' * 5)
    data = work / "d.jsonl"
    data.write_text('{"instruction": "w3", "output": "w4 w5"}\n' * 6 + '{"instruction": 3, "output": ""}\n')
    scan = run(
        "scan", model, "--check", work / "t.txt", "--limit", 4, "--window", 32, "--json", "-o", work / "scan.json"
    )
    tasks = ("--task", f"ppl:{work / 't.txt'}", "--task", f"cloze:{work / 'c.jsonl'}", "--window", 32)
    evaluation = run(
        "eval", model, *tasks, "--attack", "none", "--attack", "zero:1", "--json", "-o", work / "eval.json"
    )
    comparison = run("eval", "--compare", work / "eval.json", work / "eval.json", "--json")
    short = ("--task", f"ppl:{work / 't.txt'}", "--window", 32, "--limit", 4, "-k", 1, "--json")
    ablation = run("ablate", model, *short, "--mode", "zero", "--mode", "retain", "--draws", 1)
    quantizing = run("quantize-check", model, *short, "--bits", 4)
    training = (
        "finetune",
        model,
        "--data",
        data,
        "--batch-size",
        2,
        "--effective-batch",
        2,
        "--json",
        "--skip-bad-rows",
    )
    plan = run(*training, "--dry-run")
    trained = run(*training, "--max-steps", 4, "--logging-steps", 1, "--eval-share", 0.2, "-o", work / "tuned")
    ran = (scan, evaluation, comparison, ablation, quantizing, plan, trained)
    assert [one.code for one in ran] == [0] * len(ran), ran
    mark = json.loads((work / "tuned" / "checkpoint-4" / MARK).read_text())
    return {**{name: one.document for name, one in zip(KINDS[:-1], ran, strict=True)}, "mark": mark}


def identity(scan: dict[str, Any]) -> Identity:
    return Identity(model=scan["model"], revision=scan["revision"], model_type=scan["model_type"], **scan["shape"])


def used(kind: str, path: Path, originals: dict[str, dict[str, Any]]) -> None:
    """Everything a command does with such a file, and that what comes of it can be written again."""
    if kind == "ablate":
        read_document(path, {"mwtool.ablate/1": AblateDocument}, "mwtool ablate -o")
    if kind in ("scan", "ablate"):
        massive = load_massive(path, identity(originals["scan"])).massive
        if massive is not None:
            text_of(massive.document())
            assert all(type(index) is int and index >= 0 for index in massive.indices)
            assert type(massive.layer) is int
            assert 0 <= massive.layer < originals["scan"]["shape"]["layers"]
            assert 0 <= massive.dimension < originals["scan"]["shape"]["hidden_size"]
            assert all(map(math.isfinite, (*massive.magnitudes, *massive.shares, massive.value)))
        return
    if kind in ALONE:
        document, _ = read_document(path, {originals[kind]["schema"]: ALONE[kind]}, "mwtool")
        text_of(document)
        return
    if kind == "finetune":
        text_of(read_record(path))
        return
    if kind == "mark":
        marked(path, originals)
        return
    found = read_documents(path)
    rows = entries_of(found, [str(number) for number in range(len(found))])
    eval_report(rows)
    earlier_results(path, originals["eval"], found)
    text_of(found[0])
    ran = run("eval", "--compare", path, "--json")
    assert ran.code == 0, ran.err
    assert ran.document["schema"] == "mwtool.comparison/1"


def marked(path: Path, originals: dict[str, dict[str, Any]]) -> None:
    """A checkpoint with this mark and the files that the original names: continued from, or passed over with a note."""
    run_folder = path.with_suffix(".run")
    folder = run_folder / "checkpoint-4"
    folder.mkdir(parents=True, exist_ok=True)
    for name, said in originals["mark"]["files"].items():
        (folder / name).write_bytes(b"x" * said["size"])
    with patch.object(checkpointing, "_described", lambda file: originals["mark"]["files"][file.name]):
        (folder / MARK).write_bytes(path.read_bytes())
        found, notes = newest(run_folder, originals["mark"]["settings"])
    if found is None:
        assert all("\n" not in note for note in notes)
        raise BadValue(*notes)
    assert list(found.history) == list(range(1, len(found.history) + 1))
    assert all(0 <= p <= 1 for p in found.history.values())


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every key and index in a document, with what holds it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, -1e308, 10**17, 10**400, -(10**400), math.nan, math.inf),
    *("", "x", "none", "zero:1", "mean:1", "zero:0", "zero:" + "9" * 500, "\ud800", "\0", "x" * 5000, "../x"),
    *([], {}, [None], [1], ["x"], [[]], {"x": 1}, [True], [math.nan], {"": {}}),
)


def mutated(document: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The document with one to three keys or entries replaced, removed, repeated or moved."""
    changed = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = list(places(changed))
        if not found:
            break
        holder, key = draw.choice(found)
        act = draw.choice(("replace", "replace", "replace", "remove", "repeat", "swap", "grow"))
        if act == "replace":
            holder[key] = draw.choice(VALUES)
        elif act == "remove":
            del holder[key]
        elif act == "repeat" and isinstance(holder, list):
            holder.insert(key, holder[key])
        elif act == "swap":
            other, place = draw.choice(found)
            with_other = copy.deepcopy(other[place]) if _holds(other, place) else None
            holder[key] = with_other
        elif isinstance(holder[key], int | float):
            holder[key] *= draw.choice((-1, 2, 0.5, 10**6))
    return changed


def _holds(holder: Any, place: Any) -> bool:
    return place in holder if isinstance(holder, dict) else place < len(holder)


def complaint_of(kind: str, path: Path, originals: dict[str, dict[str, Any]]) -> str | None:
    try:
        used(kind, path, originals)
    except BadValue as fault:
        return str(fault)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_document_is_refused_in_one_line_or_right(
    kind: str, documents: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    draw, refused, count = random.Random(kind), 0, MUTATIONS // len(KINDS)
    path = tmp_path / "document.json"
    for _ in range(count):
        path.write_text(json.dumps(mutated(documents[kind], draw)))
        said = complaint_of(kind, path, documents)
        refused += said is not None
        assert said is None or ("\n" not in said and len(said) < 600)
    assert count // 3 < refused < count


@pytest.mark.filterwarnings("ignore")  # of numbers that no axis has
@pytest.mark.parametrize("kind", ["scan", "eval", "comparison", "ablate", "quantize-check", "finetune"])
def test_a_mutated_document_that_is_valid_is_drawn(
    kind: str, documents: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    draw, drawn = random.Random(f"{kind} drawn"), 0
    path = tmp_path / "document.json"
    while drawn < DRAWN:
        path.write_text(json.dumps(mutated(documents[kind], draw)))
        with suppress(BadValue):
            found = read_for_page([path])
            assert page_of(list(found.values())).encode()
            drawn += 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_untouched_document_is_read_as_it_was_written(
    kind: str, documents: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "document.json"
    path.write_text(text_of(documents[kind]))
    used(kind, path, documents)


BYTES = {
    "nothing": (b"", "is not JSON"),
    "cut short": (b'{"schema": ', "is not JSON"),
    "nested": (b"[" * 100_000, "nested too deeply"),
    "nested and closed": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "no text": (b"\xff\xfe{}", "is not UTF-8 text"),
    "a list": (b"[1]", "holds a list"),
    "another schema": (b'{"schema": "mwtool.scan/99"}', "has schema 'mwtool.scan/99'; expected"),
    "a schema that is a list": (b'{"schema": []}', "has schema []; expected"),
    "a number of 5,000 digits": (b'{"schema": ' + b"9" * 5000 + b"}", "is not JSON"),
    "a number beyond doubles": (b'{"schema": 1e999}', "is too large for a number"),
    "NaN": (b'{"schema": NaN}', "NaN is no number in JSON"),
}


@pytest.mark.parametrize("name", BYTES)
def test_what_is_no_document_at_all_is_one_line(name: str, tmp_path: Path) -> None:
    content, words = BYTES[name]
    path = tmp_path / "document.json"
    path.write_bytes(content)
    commands = (
        ["eval", "demo", "--attack", "zero:1", "--massive", path],
        ["eval", "--compare", path],
        ["eval", "demo", "--resume", "-o", path],
        ["ablate", "demo", "--massive", path],
    )
    for command in commands:
        fault = run(*command).fault
        assert words in fault
        assert str(path) in fault


@pytest.mark.parametrize("kind", ["folder", "absent", "dangling"])
def test_a_path_that_is_no_file_is_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    words = {"folder": "is a folder", "absent": "does not exist", "dangling": "is a link to nowhere"}[kind]
    assert words in run("ablate", "demo", "--massive", path).fault


def test_resuming_a_finished_evaluation_keeps_its_notes(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("It was a dark night and the wind was in the trees. " * 3)
    command = ("eval", "demo", "--task", f"ppl:{tmp_path / 't.txt'}", "-o", tmp_path / "eval.json")
    assert run(*command).code == 0
    before = json.loads((tmp_path / "eval.json").read_text())
    assert before["notes"]
    assert run(*command, "--resume").code == 0
    after = json.loads((tmp_path / "eval.json").read_text())
    assert after["notes"] == before["notes"]
    assert after["results"] == before["results"]
    more = run(*command, "--resume", "--task", "ppl:demo", "--limit", "1")
    assert more.code == 1  # another limit
    assert run(*command, "--resume", "--attack", "none", "--attack", "scale:0.5:1").code == 0
    assert set(before["notes"]) <= set(json.loads((tmp_path / "eval.json").read_text())["notes"])


def test_pydantic_is_imported_when_a_document_is_read_or_written_and_not_before(tmp_path: Path) -> None:

    code = (
        "import sys, mwtool.massive, mwtool.scan.document, mwtool.evaluation.document, mwtool.cli; "
        "sys.exit('mwtool.files.schema' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
