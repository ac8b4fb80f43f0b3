"""Scans of models on the Hub by ranges: only what is read is fetched, and never a number that is wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event, active_count
from typing import Any

import hub
import pytest
import tiny
import torch
from command import run
from huggingface_hub import constants, utils
from safetensors import safe_open

from mwtool.models import fetching, remote_tensors, weight_files
from mwtool.models.locate import locate
from mwtool.scan.plan import plan_scan
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.settings import Settings
from mwtool.scan.subject import streamed

SHARD = "model-00002-of-00009.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers in 9 shards, massive in layer 1."""
    model = tiny.model("llama", torch.bfloat16)
    tiny.plant(model)
    return tiny.saved(tmp_path_factory.mktemp("model"), model, max_shard_size="20KB")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The same model in one file."""
    model = tiny.model("llama", torch.bfloat16)
    tiny.plant(model)
    return tiny.saved(tmp_path_factory.mktemp("single"), model)


@pytest.fixture
def models(folder: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
    """A Hub with the model in shards and in one file, in the place of the real one, and an empty cache."""
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    with hub.serving() as served:
        served.repos |= {"some/model": folder, "some/single": single}
        hub.use(served.endpoint, tmp_path / "cache", monkeypatch)
        yield served
    utils.close_session()


def scanned(model: object, *options: str) -> dict[str, Any]:
    """The document of a scan, without what tells one model's name and commit from another's."""
    ran = run("scan", model, "--json", *options)
    assert (ran.code, ran.err) == (0, "")
    return {key: value for key, value in ran.document.items() if key not in ("model", "revision", "command")}


def tensors(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a file begin, and its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return 8 + length, json.loads(file.read(length))


def read(models: hub.Hub, folder: Path) -> dict[str, int]:
    """Tensor name -> bytes of it that were asked for."""
    found: dict[str, int] = {}
    for file, first, end in models.parts:
        begin, header = tensors(folder / file)
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (begin + one for one in entry["data_offsets"])
                if overlap := max(0, min(end, stop) - max(first, start)):
                    found[name] = found.get(name, 0) + overlap
    return found


@pytest.mark.parametrize("name", ["some/model", "some/single"])
def test_a_scan_by_ranges_is_that_of_the_folder_and_reads_nothing_of_layers_not_walked(
    models: hub.Hub, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_tensors, "FIRST", 8)  # more would bring tensors of these small files along
    folder = models.repos[name]
    assert scanned(name, "--layers", "0-2") == scanned(folder, "--layers", "0-2")
    assert [file for file in models.sent if file.endswith(".safetensors")] == []
    asked = read(models, folder)
    layers = {int(one.split(".")[2]) for one in asked if one.startswith("model.layers.")}
    assert layers == {0, 1, 2}
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    assert asked.pop("model.embed_tokens.weight") == 2 * width  # one row of bfloat16
    assert all(one.startswith("model.layers.") for one in asked)
    held = {one: entry for path in folder.glob("*.safetensors") for one, entry in tensors(path)[1].items()}
    whole = {one: held[one]["data_offsets"][1] - held[one]["data_offsets"][0] for one in asked}
    assert asked == whole  # each tensor of these layers once, also those that are read again to rank rows


def test_all_layers_by_ranges_are_those_of_the_folder(models: hub.Hub, folder: Path) -> None:
    assert scanned("some/model", "--download", "ranges") == scanned(folder)


def test_what_was_read_is_kept_and_needs_no_hub(models: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scanned("some/model")
    models.parts.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert scanned("some/model") == first
    assert models.parts == []


def test_shards_in_the_cache_are_used_as_they_are(models: hub.Hub) -> None:
    whole = scanned("some/model", "--download", "whole")
    assert scanned("some/model", "--download", "ranges") == whole
    assert models.parts == []


@pytest.mark.parametrize("mood", ["drop", "short", "none", 429, 500, 503])
@pytest.mark.parametrize("where", ["header", "tensor"])
def test_what_breaks_off_is_gone_on_with(models: hub.Hub, folder: Path, mood: hub.Mood, where: str) -> None:
    models.moods = [mood]
    if where == "tensor":
        scanned("some/single", "--layers", "0-0")
        models.moods = [mood, mood, mood]
    assert scanned("some/single") == scanned(folder)
    assert models.moods == []


def test_bytes_that_arrived_are_not_asked_for_again(models: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "CONNECTIONS", 1)
    scanned("some/single", "--layers", "0-0")
    models.parts.clear()
    models.moods = ["drop"]
    scanned("some/single", "--layers", "0-1")
    (_, first, end), (_, again, stop) = models.parts[:2]
    assert first < again < end == stop


def test_an_interrupted_range_is_gone_on_with_by_the_next_run(
    models: hub.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "CONNECTIONS", 1)
    scanned("some/single", "--layers", "0-0")
    models.parts.clear()
    models.moods = ["drop", 403]
    assert "answered 403" in run("scan", "some/single").fault
    begun, broken = models.parts[:2]
    assert begun[1] < broken[1] < broken[2] == begun[2]
    assert scanned("some/single") == scanned(folder)
    assert models.parts.count(broken) == 2
    assert models.parts.count(begun) == 1  # not from where the tensor begins


REFUSED: dict[hub.Mood, str] = {
    401: "answered 401 Unauthorized (log in with `hf auth login`",
    403: "answered 403 Forbidden",
    416: "answered 416",
    "etag": "changed while it was read",
    "size": "changed while it was read",
    "shift": "were asked for, the answer says",
    "long": "more bytes than were asked for",
}


@pytest.mark.parametrize("mood", REFUSED)
@pytest.mark.parametrize("where", ["header", "tensor"])
def test_what_cannot_be_right_is_refused_in_one_line(models: hub.Hub, mood: hub.Mood, where: str) -> None:
    if where == "tensor":
        scanned("some/single", "--layers", "0-0")
    models.moods = [mood]
    assert REFUSED[mood] in run("scan", "some/single").fault


@pytest.mark.parametrize(("mood", "words"), [("none", "no more bytes arrive"), (429, "answered 429"), (503, "503")])
def test_a_server_that_stays_so_is_told_in_one_line(models: hub.Hub, mood: hub.Mood, words: str) -> None:
    scanned("some/single", "--layers", "0-0")
    models.moods = [mood] * 99
    assert words in run("scan", "some/single").fault


def test_a_server_without_ranges_has_its_shards_fetched_whole_or_is_refused(
    models: hub.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_tensors, "FIRST", 8)  # else these small files are asked for whole
    models.moods = ["ignore"] * 99
    assert "does not give parts of model.safetensors" in run("scan", "some/single", "--download", "ranges").fault
    assert scanned("some/model") == scanned(folder)


def test_a_token_goes_to_the_hub_and_not_to_where_it_redirects(
    models: hub.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub.serving() as cdn:
        cdn.repos["some/model"] = folder
        models.elsewhere = cdn.endpoint
        assert scanned("some/model") == scanned(folder)
        assert set(models.tokens) == {"Bearer hf_secret"}
        assert cdn.tokens == []
        assert len(cdn.parts) > 9
        assert models.parts == []


def test_a_file_that_changes_on_the_other_host_is_refused(models: hub.Hub, folder: Path) -> None:
    with hub.serving() as cdn:
        cdn.repos["some/model"] = folder
        models.elsewhere = cdn.endpoint
        cdn.moods = ["short", "etag"]
        assert "changed while it was read" in run("scan", "some/model").fault


def test_files_that_are_no_safetensors_are_refused(models: hub.Hub, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    models.repos["some/model"] = copy
    content = (copy / SHARD).read_bytes()
    for bad, words in (
        (content[:-1], "cut short"),
        (b"", "cut short"),
        (b"\xff" * 100, "not safetensors"),
        (struct.pack("<Q", 4) + b"[]  ", "no usable safetensors header"),
        (struct.pack("<Q", 12) + b'{"a":{"x":1}', "no usable safetensors header"),
    ):
        (copy / SHARD).write_bytes(bad)
        assert words in run("scan", "some/model").fault


@pytest.mark.parametrize("name", ["some/model", "some/single"])
def test_more_names_than_a_model_has_are_refused(models: hub.Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "MOST_TENSORS", 50)
    monkeypatch.setattr(remote_tensors, "FIRST", 8)
    assert "names 75 tensors; expected 50 at most" in run("scan", name).fault
    assert read(models, models.repos[name]) == {}


def test_an_index_that_is_too_long_is_refused(models: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "LONGEST_INDEX", 1000)
    assert "it is no index of a model's" in run("scan", "some/model").fault


def test_a_slow_server_is_waited_for_and_asked_again(
    models: hub.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    scanned("some/single", "--layers", "0-0")
    models.moods = ["slow"]
    assert scanned("some/single", "--layers", "0-2") == scanned(folder, "--layers", "0-2")
    models.moods = ["slow"] * 99
    assert "no more bytes" in (fault := run("scan", "some/single").fault) or "timed out" in fault


def test_several_readers_at_once_fetch_a_tensor_once(models: hub.Hub, single: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    with safe_open(single / "model.safetensors", framework="pt") as handle:
        expected = handle.get_tensor(name)

    def one(_: int) -> torch.Tensor:
        opened = remote_tensors.open_remote("some/single", "model.safetensors", hub.COMMIT)
        assert opened is not None
        return opened.get_slice(name)[...]

    utils.get_session()  # here, since huggingface_hub 1.5 would make one in each thread and lose all but the last
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(8)))
    assert all(torch.equal(each, expected) for each in found)
    assert len([part for part in models.parts if part[1] > 0]) == 1


def test_ranges_of_a_layer_and_of_the_next_are_fetched_at_once_over_so_many_connections(
    models: hub.Hub, folder: Path
) -> None:
    models.delay = 0.02
    before = active_count()
    assert scanned("some/single") == scanned(folder)
    assert 4 < models.most_at_once <= fetching.CONNECTIONS
    assert active_count() <= before + 8  # the server's own, one a connection: those that fetched have ended
    order = [first for _, first, _ in models.parts]
    assert order != sorted(order)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_processes_that_are_killed_leave_nothing_that_is_read_wrongly(
    models: hub.Hub, single: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_tensors, "FIRST", 8)
    scanned("some/single", "--layers", "0-0")
    models.delay, models.rate = 0.02, 40_000
    draw = random.Random(0)
    with safe_open(single / "model.safetensors", framework="pt") as handle:
        held = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    seen = []
    for _ in range(8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, here the server's
            child = os.fork()
        if child == 0:
            try:
                scan_checkpoint("some/single", download="ranges")
            finally:
                os._exit(0)
        begun = len(models.parts)
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while len(models.parts) == begun and os.waitid(os.P_PID, child, ended) is None:
            Event().wait(0.01)
        Event().wait(draw.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kept = list(Path(constants.HF_ASSETS_CACHE).rglob("*.safetensors"))
        for path in kept:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - likewise
                    rows = slice(tiny.BOS, tiny.BOS + 1) if "embed_tokens" in name else slice(None)
                    assert torch.equal(handle.get_tensor(name), held[name][rows])
        seen.append(len(kept))
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]
    models.rate = None
    assert scanned("some/single") == scanned(folder)


@pytest.mark.parametrize("mood", [None, "drop"])
@pytest.mark.parametrize("where", ["Hub", "Hub again", "folder"])
def test_bytes_told_of_as_they_arrive_come_to_those_that_are_planned(
    models: hub.Hub, tmp_path: Path, where: str, mood: hub.Mood | None
) -> None:
    models.repos["some/mixture"] = tiny.saved(tmp_path / "mixture", tiny.model("mixtral", torch.bfloat16))
    name = str(models.repos["some/mixture"]) if where == "folder" else "some/mixture"
    plan = plan_scan(name)
    models.moods = [] if mood is None else [mood] * 3
    for _ in range(2 if where == "Hub again" else 1):
        told: list[tuple[int, int]] = []
        scan_checkpoint(name, download="auto", on_bytes=lambda done, total, told=told: told.append((done, total)))
    row = plan.parts[0].size
    assert told[-1] == (plan.size - row, plan.size - row)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert all(done <= total for done, total in told)
    assert len(told) >= tiny.LAYERS


def test_what_is_read_after_a_forward_is_fetched_without_its_threads(models: hub.Hub, tmp_path: Path) -> None:
    """As an expert is whose row was not kept."""
    mixture = tiny.saved(tmp_path / "mixture", tiny.model("mixtral", torch.bfloat16))
    models.repos["some/mixture"] = mixture
    found = []
    for name in ("some/mixture", str(mixture)):
        subject = streamed(replace(locate(name), download="ranges"), Settings())
        assert subject.stream is not None
        with subject.running() as model, torch.no_grad():
            model(input_ids=torch.tensor([[tiny.BOS]]), use_cache=False)
        held = [subject.stream.holding(subject.layers[2], ffn) for ffn in subject.layers[2].ffns]
        for one in held:
            with one as ffn:
                found.append(ffn.down.read(subject.model).clone())
    half = len(found) // 2
    assert all(map(torch.equal, found[:half], found[half:]))


def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(
    models: hub.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    scanned("some/single", "--layers", "0-0")
    models.moods = [429, 429]
    assert scanned("some/single") == scanned(folder)
    assert slept == [8.0, 8.0]  # Retry-After: 7, and one for rounding


def test_the_cache_is_walked_only_where_it_may_be_full(
    models: hub.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[Path] = []
    real = remote_tensors._cleared
    monkeypatch.setattr(remote_tensors, "_cleared", lambda root, last: walks.append(root) or real(root, last))
    assert scanned("some/single") == scanned(folder)
    assert len(walks) == 1  # the first time, to know what is there
    assert len(list(Path(constants.HF_ASSETS_CACHE).rglob("*.safetensors"))) > 50
    held = sum(path.stat().st_size for path in walks[0].rglob("*.safetensors"))
    assert sum(remote_tensors._counted[walks[0]]) == held


def test_what_other_processes_add_to_the_cache_is_noticed_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_tensors, "LIMIT", 16_000)

    def add(name: str, size: int) -> Path:
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(bytes(size))
        return path

    remote_tensors._keep_within(tmp_path, add("ours", 100))
    for number in range(40):
        add(f"theirs{number}", 1000)
    for number in range(12):
        remote_tensors._keep_within(tmp_path, add(f"more{number}", 100))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 16_000 + 100 * 12


def test_rows_by_range_are_the_rows(models: hub.Hub, single: Path) -> None:
    opened = remote_tensors.open_remote("some/single", "model.safetensors", hub.COMMIT)
    assert opened is not None
    with safe_open(single / "model.safetensors", framework="pt") as handle:
        for name in opened.keys():  # noqa: SIM118 - as of safe_open, not a mapping
            whole, lazy = handle.get_tensor(name), opened.get_slice(name)
            assert (lazy.get_shape(), lazy.get_dtype()) == (list(whole.shape), "BF16")
            for index in (..., slice(None), slice(3, 5), slice(1, 1), slice(-2, None), slice(0, 9, 2), 4):
                assert torch.equal(lazy[index], whole[index])


def test_the_cache_stays_within_its_limit(models: hub.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_tensors, "LIMIT", 20_000)
    assert scanned("some/single") == scanned(folder)
    kept = [path.stat().st_size for path in Path(constants.HF_ASSETS_CACHE).rglob("*.safetensors")]
    assert 0 < sum(kept) <= 20_000 + max(kept)
    assert sum(end - first for _, first, end in models.parts) > sum(kept)


@pytest.mark.parametrize("name", ["some/single", "some/model", "some/mixture"])
def test_a_dry_run_reads_headers_and_says_what_the_scan_then_asks_for(
    models: hub.Hub, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_tensors, "FIRST", 8)
    models.repos["some/mixture"] = tiny.saved(tmp_path / "mixture", tiny.model("mixtral", torch.bfloat16))
    plan = plan_scan(name, Settings(last_layer=1))
    assert read(models, models.repos[name]) == {}
    ran = run("scan", name, "--layers", "0-1", "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    assert f"{plan.size:,}" in ran.out
    assert read(models, models.repos[name]) == {}
    scanned(name, "--layers", "0-1")
    asked = read(models, models.repos[name])
    assert (len(asked), sum(asked.values())) == (sum(part.tensors for part in plan.parts), plan.size)


@pytest.mark.parametrize("options", [["-o", "scan.json"], ["--check"], ["--sinks"], ["--push-to-hub", "a/b"]])
def test_a_dry_run_makes_no_results(options: list[str]) -> None:
    ran = run("scan", "demo", "--dry-run", *options)
    assert ran.code == 2
    assert "--dry-run shows what a scan of bos reads" in " ".join(ran.err.split())
