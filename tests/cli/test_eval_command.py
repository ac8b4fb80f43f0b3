"""`mwtool eval` as a user meets it: models, tasks and attacks in; table, document and result file out."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run, run_apart
from forks import forked
from peft import LoraConfig, get_peft_model
from questions import CHOICES, CLOZE, rows
from rich.console import Console
from transformers import AutoModelForCausalLM
from words import WORDS, planted_folder, with_tokenizer

from mwtool.evaluation.comparison import Entry
from mwtool.evaluation.measurement import Measured
from mwtool.evaluation.report import eval_report
from mwtool.files.document import text_of
from mwtool.scan.document import scan_document
from mwtool.scan.scanner import scan_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("questions")
    return rows(folder, "mc", CHOICES), rows(folder, "cloze", CLOZE)


def evaluated(folder: Path, *arguments: object) -> Any:
    return run("eval", folder, "--task", f"ppl:{folder / 'text.txt'}", "--window", 16, *arguments)


ENVELOPE = "schema mwtool_version model revision model_type dtype device seed versions command"
EVAL = "adapter on attention bos options batch_size massive places attacks tasks complete results means notes"
RESULT = (
    "attack task part metric value stderr n seconds nonfinite higher_is_better digest setting samples weights answers"
)


def test_the_document_has_all_it_takes_to_repeat_the_run(folder: Path, questions: Any, tmp_path: Path) -> None:
    mc, cloze = questions
    ran = evaluated(
        folder, "--task", mc, "--task", cloze, "--attack", "none", "--attack", "zero:3", "--batch-size", 4, "--seed", 7,
        "--json", "-o", tmp_path / "a.json",
    )  # fmt: skip
    document = ran.document
    assert ran.code == 0
    assert document == json.loads((tmp_path / "a.json").read_text())
    assert list(document) == f"{ENVELOPE} {EVAL}".split()
    assert all(list(one) == RESULT.split() for one in document["results"])
    assert [(one["attack"], one["task"].partition(":")[0], one["metric"]) for one in document["results"]] == [
        (attack, kind, metric)
        for attack in ("none", "zero:3")
        for kind, metric in (
            ("ppl", "perplexity"), ("mc", "acc"), ("mc", "acc_norm"), ("cloze", "acc"), ("cloze", "perplexity")
        )
    ]  # fmt: skip
    assert (document["schema"], document["seed"], document["attention"]) == ("mwtool.eval/1", 7, "sdpa")
    assert (document["dtype"], document["device"], document["batch_size"]) == ("float32", "cpu", 4)
    assert document["bos"] == {"id": 1, "token": "<s>", "how": "tokenizer"}
    assert document["massive"]["indices"][0] == 17
    assert document["complete"]
    assert {"python", "torch", "transformers", "lm_eval", "datasets", "peft", "accelerate"} == set(document["versions"])
    first = document["results"][0]
    assert first["value"] == pytest.approx(math.exp(sum(first["samples"]) / sum(first["weights"])))
    assert first["setting"] == {"protocol": "bos", "window": 16, "bos": 1, "notes": []}


def test_every_key_of_the_documents_is_described(folder: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    assert evaluated(folder, "-o", tmp_path / "a.json", "--attack", "none", "--attack", "zero:1").code == 0
    compared = run(
        "eval", "--compare", tmp_path / "a.json", tmp_path / "a.json", folder, "--task", "ppl:demo", "--json"
    )
    document = compared.document
    envelope, own = text.split("\n## ")[1], text[text.index("## `mwtool.eval/1`") :]
    described = set(re.findall(r"`([a-z_]+)`", envelope + own))
    names = {*document, *document["pairs"][0], *document["models"][0], *document["models"][0]["results"][0]}
    assert names - described == set()


def test_the_table_is_model_by_attack_by_task_with_standard_errors(folder: Path, questions: Any) -> None:
    ran = evaluated(folder, "--task", questions[0], "--attack", "none", "--attack", "zero:3")
    lines = [line.split() for line in ran.out.splitlines()]
    assert lines[0] == "task metric attack value ± s.e. n vs first".split()
    assert [line[:3] for line in lines[1:]] == [
        ["ppl:text.txt", "perplexity", "none"], ["ppl:text.txt", "perplexity", "zero:3"],
        ["mc:mc.jsonl", "acc", "none"], ["mc:mc.jsonl", "acc", "zero:3"],
        ["mc:mc.jsonl", "acc_norm", "none"], ["mc:mc.jsonl", "acc_norm", "zero:3"],
    ]  # fmt: skip
    assert re.search(r"x[\d.,]+ \[[\d.,]+, [\d.,]+\]", ran.out)


def test_the_bundled_model_has_questions_of_its_own_and_answers_above_chance() -> None:
    document = run("eval", "--task", "mc:demo", "--task", "cloze:demo", "--limit", 60, "--json").document
    found = {(one["task"], one["metric"]): one for one in document["results"]}
    acc = found["mc:demo", "acc"]
    assert acc["n"] == 60
    assert acc["value"] - 2 * acc["stderr"] > 0.25
    assert found["cloze:demo", "perplexity"]["value"] < 4096 / 8


def test_a_killed_run_loses_the_task_in_hand_and_resume_does_the_rest(folder: Path, tmp_path: Path) -> None:
    order = torch.randint(40, (900,), generator=torch.Generator().manual_seed(1)).tolist()
    tasks = []
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(" ".join(WORDS[at] for at in order[number:]))
        tasks += ["--task", f"ppl:{tmp_path / f'{number}.txt'}"]
    output = tmp_path / "out.json"
    arguments = ["eval", folder, *tasks, "--window", "4", "--batch-size", "1", "-o", output]
    process = forked(*arguments)
    while not output.exists():
        process.signal(0)  # fails once it has ended
        time.sleep(0.01)
    process.signal(signal.SIGKILL)
    status, _, err = process.end()
    killed = json.loads(output.read_text())
    assert status == -signal.SIGKILL, err
    assert not killed["complete"]
    assert 1 <= len(killed["results"]) < 5
    ran = run(*arguments, "--resume", "--json")
    assert ran.code == 0
    document = ran.document
    assert document["complete"]
    assert document["results"][: len(killed["results"])] == killed["results"]  # seconds included: not measured again
    assert [one["task"] for one in document["results"]] == tasks[1::2]
    again = run(*arguments, "--resume", "--json")
    assert again.document["results"] == document["results"]


def test_a_run_is_not_resumed_under_other_conditions(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    assert evaluated(folder, "-o", output).code == 0
    fault = evaluated(folder, "-o", output, "--resume", "--limit", 2).fault
    assert "a.json was made with options limit None, now it is limit 2; use the same" in fault
    assert "use the same to resume, or write elsewhere" in fault
    assert "was made with bos" in evaluated(folder, "-o", output, "--resume", "--bos", "w1").fault
    more = evaluated(folder, "-o", output, "--resume", "--attack", "none", "--attack", "zero:2", "--json").document
    assert [one["attack"] for one in more["results"]] == ["none", "zero:2"]
    output.write_text("{}")
    assert "has schema None; expected 'mwtool.eval/1'" in evaluated(folder, "-o", output, "--resume").fault


def test_models_and_earlier_results_stand_side_by_side_with_paired_differences(
    folder: Path, questions: Any, tmp_path: Path
) -> None:
    mc, _ = questions
    task = f"ppl:{folder / 'text.txt'}"
    other = with_tokenizer(tmp_path / "other", tiny.model("llama", seed=3))
    assert run("eval", folder, "--task", task, "--task", mc, "--window", 16, "-o", tmp_path / "first.json").code == 0
    ran = run(
        "eval", "--compare", tmp_path / "first.json", other, "--task", task, "--task", mc, "--window", 16, "--json",
        "-o", tmp_path / "both.json",
    )  # fmt: skip
    document = ran.document
    assert (document["schema"], document["names"]) == ("mwtool.comparison/1", ["first", str(other)])
    one, two = (model["results"] for model in document["models"])
    ratio, points, _ = document["pairs"]
    assert (ratio["kind"], points["kind"]) == ("ratio", "points")
    assert ratio["value"] == pytest.approx(two[0]["value"] / one[0]["value"])
    assert ratio["interval"][0] < ratio["value"] < ratio["interval"][1]
    assert points["value"] == pytest.approx(100 * (two[1]["value"] - one[1]["value"]))
    assert ratio["beside"] == {"model": "first", "attack": "none"}
    table = run("eval", "--compare", tmp_path / "both.json", "--task", task).out
    assert "both: " in table
    assert re.search(r"x[\d.,]+ \[", table)
    swapped = run(
        "eval", "--compare", other, tmp_path / "first.json", "--task", task, "--window", 16, "--json"
    ).document
    assert swapped["pairs"][0]["value"] == pytest.approx(1 / ratio["value"])


def test_other_windows_are_not_paired_and_said_so(folder: Path, tmp_path: Path) -> None:
    task = f"ppl:{folder / 'text.txt'}"
    assert run("eval", folder, "--task", task, "--window", 16, "-o", tmp_path / "a.json").code == 0
    assert run("eval", folder, "--task", task, "--window", 32, "-o", tmp_path / "b.json").code == 0
    ran = run("eval", "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert "different examples" in ran.out
    assert (
        run("eval", "--compare", tmp_path / "a.json", tmp_path / "b.json", "--json").document["pairs"][0]["kind"]
        is None
    )


def test_an_adapter_is_attacked_below_it_or_in_the_sum(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(target_modules=["up_proj"], init_lora_weights=False, lora_alpha=512),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    options = (
        "--task",
        f"ppl:{folder / 'text.txt'}",
        "--window",
        16,
        "--attack",
        "none",
        "--attack",
        "zero:3",
        "--json",
    )
    base, merged = (run("eval", tmp_path / "adapter", *options, "--on", on).document for on in ("base", "merged"))
    assert (base["on"], merged["on"], base["adapter"]) == ("base", "merged", str(tmp_path / "adapter"))
    assert base["results"][0]["value"] == pytest.approx(merged["results"][0]["value"], rel=1e-4)
    assert base["results"][1]["value"] != pytest.approx(merged["results"][1]["value"], rel=1e-5)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "./gone"}))
    fault = run("eval", tmp_path / "adapter", *options).fault
    assert "no such folder: ./gone" in fault
    assert str(tmp_path / "adapter") in fault


def test_a_saved_scan_gives_what_scanning_gives(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "scan.json").write_text(text_of(scan_document(scan_checkpoint(str(folder)))))
    options = ("--attack", "retain:2", "--json")
    found = [evaluated(folder, *options, *more).document for more in ([], ["--massive", tmp_path / "scan.json"])]
    assert found[0]["results"][0]["samples"] == found[1]["results"][0]["samples"]


def test_answers_stand_side_by_side_and_all_of_them_in_the_document(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{n} w2"}) + "\n" for n in range(7)))
    options = (
        "--task",
        f"generate:{tmp_path / 'prompts.jsonl'}",
        "--new-tokens",
        5,
        "--attack",
        "none",
        "--attack",
        "zero:3",
    )
    ran = run("eval", folder, *options)
    assert re.search(r"─ none ─+╮ ╭─+ zero:3 ─", ran.out)
    assert "prompt 1: w0 w2" in ran.out
    assert "2 more prompts" in ran.out
    document = run("eval", folder, *options, "--json").document
    assert [len(one["answers"]) for one in document["results"]] == [7, 7]
    assert document["results"][0]["setting"]["prompts"][6] == "w6 w2"


def test_what_is_not_finite_is_null_in_the_document_and_said_in_the_table(folder: Path) -> None:
    options = ("--attack", "scale:1e38:1")
    result = evaluated(folder, *options, "--json").document["results"][0]
    assert result["value"] is None
    assert "finite" in result["nonfinite"]
    assert "not finite" in evaluated(folder, *options).out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query"\n', ", line 2: not JSON"),
        ("\n[1]\n", ", line 2: holds a list"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}\n', ", line 1: gold is 2; expected an index from 0 to 1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}\n', "line 1: gold is True"),
        ('{"query": "a", "choices": ["b", "c"]}\n', "line 1: gold is None"),
        ('{"query": "a", "choices": ["b"], "gold": 0}\n', "line 1: choices is ['b']; expected a list of at least two"),
        ('{"choices": ["b", "c"], "gold": 0}\n', "line 1: query is missing (the record has choices, gold)"),
        ("", "mc.jsonl is empty"),
    ],
)
def test_a_malformed_line_is_named_with_its_file_before_a_model_is_opened(
    tmp_path: Path, lines: str, message: str
) -> None:
    (tmp_path / "mc.jsonl").write_text(lines)
    fault = run("eval", "./nowhere", "--task", f"mc:{tmp_path / 'mc.jsonl'}").fault
    assert "mc.jsonl" in fault
    assert message in fault


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "arc_eesy"], "has no task 'arc_eesy'; did you mean arc_easy"),
        (["--task", "papr"], "did you mean paper"),
        (["--task", "pp:demo"], "did you mean ppl:demo?"),
        (["--task", "mc:"], "names no file"),
        (["--task", "ppl:absent.txt"], "absent.txt does not exist"),
        (["--task", "generate:absent.txt"], "absent.txt does not exist"),
        (["--attack", "zero"], "unknown attack 'zero'; expected none, zero:K"),
        (["--attack", "zero:99"], "k is 99"),
        (["--massive", "absent.json", "--attack", "zero:1"], "absent.json"),
        (["--bos", "never"], "protocol bos puts bos first and none was given"),
        (["--task", "ppl:wikitext2"], "use a local text with ppl:FILE"),
        (["-o", "no/where.json"], "does not exist"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_1(folder: Path, arguments: list[str], message: str) -> None:
    assert message in run("eval", folder, *arguments).fault


@pytest.mark.parametrize(
    "arguments",
    [
        ["one", "two"], ["--resume"], ["--compare", "a", "b", "--revision", "x"], ["--limit", "0"],
        ["--protocol", "none"], ["--window", "1"], ["--batch-size", "0"], ["--new-tokens", "0"],
        ["--compare", "a", "b", "--massive", "x"],
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_2(arguments: list[str]) -> None:
    ran = run("eval", *arguments)
    assert (ran.code, ran.out) == (2, "")


def test_options_come_from_a_file_and_flags_win(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"task: ['ppl:{folder / 'text.txt'}']\nattack: [none, 'zero:1']\nwindow: 16\nlimit: 3\n"
    )
    document = run("eval", folder, "--config", tmp_path / "c.yaml", "--limit", 2, "--json").document
    assert [(one["attack"], one["n"]) for one in document["results"]] == [("none", 2), ("zero:1", 2)]
    assert document["options"]["window"] == 16


def test_windows_are_shortened_to_the_model_and_short_texts_are_evaluated_and_both_said(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    ran = run("eval", folder, "--task", f"ppl:{tmp_path / 'short.txt'}", "--protocol", "sun-4096", "--json")
    assert "windows of 4096 tokens are shortened to the 64 positions of the model" in ran.err
    assert "3 tokens, fewer than a window of 64: it is evaluated as one short window" in ran.err
    assert [line.partition(": ")[2].split(": ")[0] for line in ran.document["notes"]] != []
    assert ran.document["results"][0]["n"] == 1
    assert ran.document["results"][0]["stderr"] is None


@pytest.mark.skipif(not os.environ.get("MWTOOL_HUB"), reason="set MWTOOL_HUB=1 where the Hub can be reached")
def test_the_papers_tasks_run_from_the_hub() -> None:
    assert run_apart("eval", "--task", "paper", "--limit", "2").code == 0


def test_a_run_with_an_adapter_imports_no_lm_eval_and_says_nothing_of_kernels(folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path / "adapter")
    task = ("--task", f"ppl:{folder / 'text.txt'}", "--window", 16, "--limit", 1, "--json")
    ran = run_apart("eval", tmp_path / "adapter", *task, python=("-X", "importtime"))
    assert ran.code == 0
    assert not re.search(r"\| +(lm_eval|datasets)\n", ran.err)
    assert not any("kernels" in line for line in ran.err.splitlines() if not line.startswith("import time:"))


def test_only_a_ratio_close_to_one_has_more_decimals() -> None:
    figures = [
        Entry(
            name,
            "none",
            Measured(
                task="ppl:x",
                metric="perplexity",
                value=value,
                stderr=stderr,
                n=4,
                seconds=0.1,
                samples=(1.0,) * 4,
                weights=(1.0,) * 4,
                digest="d",
            ),
        )
        for name, value, stderr in (("one", 25.74, 1.0058), ("two", 25.76, 0.9921))
    ]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(eval_report(figures))
    assert " 1.01 " in console.export_text(clear=False)
    assert " 0.99 " in console.export_text()
