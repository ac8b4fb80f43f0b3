"""Answers judged from 1 to 5: by a server on this machine that is a stub, and by a model in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from command import Ran, run
from words import planted_folder

from mwtool.evaluation import judge_server
from mwtool.evaluation.judge import PROMPT, Verdict, grading_prompt, verdict_of


class Stub:
    """A server that replies what `replies` says, in turn; a number is a status. asked: paths, headers and bodies."""

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.models = ["one"]
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.redirect: str | None = None
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub.asked.append((self.path, dict(self.headers), None))
                self._answer(200, {"data": [{"id": name} for name in stub.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append((self.path, dict(self.headers), body))
                reply = stub.replies[(len(stub.asked) - 1) % len(stub.replies)] if stub.replies else "Score: 3"
                if stub.redirect is not None:
                    self.send_response(307)
                    self.send_header("Location", stub.redirect)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                elif isinstance(reply, int):
                    self._answer(reply, {})
                elif isinstance(reply, dict):
                    self._answer(200, reply)
                else:
                    self._answer(200, {"choices": [{"message": {"role": "assistant", "content": reply}}]})

            def _answer(self, status: int, content: Any) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(judge_server, "WAIT", 0.0)
    made = Stub()
    yield made
    made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = planted_folder(tmp_path_factory.mktemp("model"))
    records = [{"prompt": f"w{at} w2", **({"reference": "w9"} if at == 1 else {})} for at in range(5)]
    (folder / "judged.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def judged(folder: Path, *more: object) -> Ran:
    return run("eval", folder, "--task", f"judge:{folder / 'judged.jsonl'}", "--new-tokens", 4, *more)


def test_scores_are_those_of_the_judge_and_prompts_and_verdicts_are_kept(folder: Path, stub: Stub) -> None:
    stub.replies = ["Score: 4", "It is fine.\nScore: 2", "5", "Score: 3.", "**Score:** 1"]
    document = judged(folder, "--judge", f"{stub.url}#grader", "--json").document
    (result,) = document["results"]
    assert (result["metric"], result["value"], result["n"]) == ("score", 3.0, 5)
    assert result["samples"] == result["setting"]["scores"] == [4, 2, 5, 3, 1]
    assert result["setting"]["verdicts"] == stub.replies
    assert result["setting"]["judge"] == f"{stub.url}#grader" == document["options"]["judge"]
    assert result["setting"]["judge_prompt"] == PROMPT
    assert len(result["answers"]) == 5
    assert (result["setting"]["refused"], result["setting"]["unreadable"]) == (0, 0)
    for at, (path, _, body) in enumerate(stub.asked):
        reference = "w9" if at == 1 else None
        assert path == "/v1/chat/completions"
        assert (body["model"], body["temperature"]) == ("grader", 0)
        assert body["messages"] == [
            {"role": "user", "content": grading_prompt(f"w{at} w2", result["answers"][at], reference)}
        ]


def test_refusals_and_verdicts_that_cannot_be_read_are_counted_and_enter_no_mean(folder: Path, stub: Stub) -> None:
    refusal = {"choices": [{"message": {"content": None, "refusal": "I'm sorry, I can't judge this."}}]}
    stub.replies = ["Score: 4", refusal, "Hm.", "Score: 9", "Score: 2"]
    ran = judged(folder, "--judge", f"{stub.url}#grader", "--json")
    (result,) = ran.document["results"]
    assert (result["value"], result["n"], result["samples"]) == (3.0, 2, [4, 2])
    assert result["setting"]["scores"] == [4, None, None, None, 2]
    assert (result["setting"]["refused"], result["setting"]["unreadable"]) == (1, 2)
    shown = judged(folder, "--judge", f"{stub.url}#grader").out
    assert "3 verdicts have no score (1 refused, 2 unreadable)" in shown
    stub.replies = ["no"]
    (none,) = judged(folder, "--judge", f"{stub.url}#grader", "--json").document["results"]
    assert (none["value"], none["nonfinite"]) == (None, "none of 5 verdicts has a score")


def test_two_states_are_compared_on_the_same_prompts_with_ties_counted(
    folder: Path, stub: Stub, tmp_path: Path
) -> None:
    stub.replies = [f"Score: {score}" for score in (4, 4, 4, 4, 4, 2, 2, 2, 4, 4)]
    attacks = ("--attack", "none", "--attack", "zero:2", "--compare")
    document = judged(folder, "--judge", f"{stub.url}#grader", *attacks, "--json", "-o", tmp_path / "a.json").document
    (pair,) = document["pairs"]
    assert (pair["kind"], pair["value"], pair["tied"]) == ("difference", pytest.approx(-1.2), 2)
    assert document["means"] == []


def test_the_token_is_sent_to_the_judge_and_is_nowhere_else(
    folder: Path, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(judge_server.TOKEN, "hush-hush")
    ran = judged(folder, "--judge", stub.url, "--limit", 1, "--json", "-o", tmp_path / "a.json")
    assert [path for path, _, _ in stub.asked] == ["/v1/models", "/v1/chat/completions"]
    assert {headers["Authorization"] for _, headers, _ in stub.asked} == {"Bearer hush-hush"}
    assert "hush-hush" not in ran.out + ran.err + (tmp_path / "a.json").read_text()
    other = Stub()
    try:
        stub.redirect = f"{other.url}/chat/completions"
        fault = judged(folder, "--judge", f"{stub.url}#grader", "--limit", 1).fault
        assert "answered 307" in fault
        assert "hush-hush" not in fault
        assert other.asked == []
    finally:
        other.close()


def test_a_busy_server_is_asked_again_and_one_that_refuses_is_not(folder: Path, stub: Stub) -> None:
    stub.replies = [503, 429, "Score: 5"]
    assert judged(folder, "--judge", f"{stub.url}#g", "--limit", 1, "--json").document["results"][0]["value"] == 5.0
    assert len(stub.asked) == 3
    stub.asked.clear()
    stub.replies = [401]
    fault = judged(folder, "--judge", f"{stub.url}#g", "--limit", 1).fault
    assert fault.startswith(f"the judge {stub.url}/chat/completions answered 401")
    assert len(stub.asked) == 1


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("http://", "is no address of a server; expected such as http://127.0.0.1:8000/v1#MODEL"),
        ("http://me:secret@host/v1#m", "--judge http://host/v1#m is no address"),
        ("http://127.0.0.1:1/v1#m", "cannot be reached"),
        ("./nowhere", "no such folder: ./nowhere"),
    ],
)
def test_a_judge_that_is_not_there_is_one_line(
    folder: Path, judge: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_server, "WAIT", 0.0)
    fault = judged(folder, "--judge", judge, "--limit", 1).fault
    assert message in fault
    assert "secret" not in fault


def test_what_a_server_may_answer_otherwise_is_one_line(folder: Path, stub: Stub) -> None:
    stub.replies = [{"choices": []}]
    assert "gave no chat completion" in judged(folder, "--judge", f"{stub.url}#g", "--limit", 1).fault
    for models, said in ((["a", "b"], "has 2 models (a, b)"), ([], "lists no model")):
        stub.models = models
        assert f"{said}; name one: --judge {stub.url}#MODEL" in judged(folder, "--judge", stub.url).fault
    assert "needs a judge; give mwtool eval --judge MODEL" in judged(folder).fault


def test_a_model_in_memory_judges_too(folder: Path, tmp_path: Path) -> None:
    """A random model gives no scores, and one with few positions has no room for the request."""
    wide = planted_folder(tmp_path / "wide", max_position_embeddings=1024)
    (result,) = judged(folder, "--judge", wide, "--limit", 2, "--json").document["results"]
    assert len(result["setting"]["verdicts"]) == 2
    assert result["setting"]["refused"] + result["setting"]["unreadable"] + result["n"] == 2
    fault = judged(folder, "--judge", folder, "--limit", 1).fault
    assert "positions, and a request with its answer takes" in fault


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Score: 4", 4),
        ("score is 3", 3),
        ("Rating = 5/5", 5),
        ("First I thought Score: 2. But:\nScore: 4", 4),
        ("[[2]]", 2),
        ("4 out of 5", 4),
        ("Score: 4.5", "unreadable"),
        ("Score: 10", "unreadable"),
        ("Score: 0", "unreadable"),
        ("between 2 and 4", "unreadable"),
        ("", "unreadable"),
        ("I cannot grade this.", "refused"),
        ("As an AI, I would rather not.", "refused"),
        ("I can't say much, but Score: 2", 2),
    ],
)
def test_a_verdict_is_read_or_said_to_be_unreadable(text: str, verdict: Verdict) -> None:
    assert verdict_of(text) == verdict


def test_braces_in_a_request_are_text() -> None:
    prompt = grading_prompt("{answer} {x}", "{request}", None)
    assert "{answer} {x}\n" in prompt
    assert "{request}\n" in prompt
    assert "A right answer" not in prompt


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "a", "reference": 3}\n', "line 1: reference is 3; expected a non-empty string"),
        ('{"reference": "a"}\n', "line 1: prompt is missing"),
    ],
)
def test_a_malformed_record_is_named_before_a_model_is_opened(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "j.jsonl").write_text(lines)
    assert message in run("eval", "./nowhere", "--task", f"judge:{tmp_path / 'j.jsonl'}", "--judge", "x").fault
