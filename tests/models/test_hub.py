"""Models on the Hub: found, fetched no further than needed, kept, and refused in one line each."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub
import pytest
import tiny
import torch
from command import run, run_apart
from hub import use
from huggingface_hub import constants, utils
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mwtool.models.load import load
from mwtool.models.locate import locate

SHARD = "model-00002-of-00009.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers in 9 shards; massive in layer 1, so that six layers are walked."""
    model = tiny.model("llama", torch.bfloat16)
    tiny.plant(model)
    return tiny.saved(tmp_path_factory.mktemp("model"), model, max_shard_size="20KB")


@pytest.fixture
def models(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
    """A Hub with `some/model`, in the place of the real one, and an empty cache."""
    with hub.serving() as served:
        served.repos["some/model"] = folder
        use(served.endpoint, tmp_path / "cache", monkeypatch)
        yield served
    utils.close_session()


def shards(names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".safetensors")}


def test_a_model_is_scanned_by_id_and_only_the_shards_it_needs_are_fetched(models: hub.Hub, folder: Path) -> None:
    found = run("scan", "some/model", "--layers", "0-5", "--download", "whole", "--json")
    assert found.code == 0, found.err
    local = run("scan", folder, "--layers", "0-5", "--json").document
    assert found.document["partial"]
    assert found.document["massive"] == local["massive"]
    assert (found.document["model"], found.document["revision"]) == ("some/model", hub.COMMIT)
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    walked = tuple(f"model.layers.{layer}." for layer in range(found.document["layers_walked"]))
    needed = {file for name, file in places.items() if name.startswith((*walked, "model.embed_tokens"))}
    assert shards(models.sent) == needed
    assert needed < set(places.values())
    assert len(models.sent) == len(set(models.sent))
    assert found.err == ""


def test_once_fetched_it_needs_no_hub(models: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = run("scan", "some/model", "--json").document
    models.sent.clear()
    assert run("scan", "some/model", "--json").document == online
    assert models.sent == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("scan", "some/model", "--json").document == online


def test_a_revision_is_resolved_to_its_commit(models: hub.Hub) -> None:
    assert run("scan", "some/model", "--revision", "v1", "--json").document["revision"] == hub.COMMIT
    fault = run("scan", "some/model", "--revision", "nosuch").fault
    assert "some/model has no revision 'nosuch'" in fault


def test_an_unknown_repository_is_neither_folder_nor_repository(models: hub.Hub) -> None:
    fault = run("scan", "some/other").fault
    assert "some/other is neither a local folder nor a repository" in fault
    assert models.endpoint in fault


def test_a_gated_repository_says_how_to_get_in(models: hub.Hub) -> None:
    models.gated.add("some/model")
    fault = run("scan", "some/model").fault
    assert "some/model is gated" in fault
    assert f"{models.endpoint}/some/model" in fault
    assert "hf auth login" in fault


def test_weights_that_become_gated_after_the_small_files_were_fetched(models: hub.Hub) -> None:
    run("scan", "some/model", "-k", "65")  # fails before any weight is read
    models.gated.add("some/model")
    assert shards(models.sent) == set()
    assert "gated" in run("scan", "some/model").fault


def test_the_original_format_resolves_to_its_sibling_and_says_so(models: hub.Hub, tmp_path: Path, folder: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    (original / "params.json").write_text("{}")
    (original / "consolidated.00.pth").write_bytes(b"")
    models.repos |= {"meta/Llama": original, "meta/Llama-hf": folder, "meta/Lonely": original}
    ran = run("scan", "meta/Llama", "--json")
    assert ran.document["model"] == "meta/Llama-hf"
    assert ran.document["notes"] == ["meta/Llama is in the original format; using meta/Llama-hf"]
    assert ran.err == f"note: {ran.document['notes'][0]}\n"
    assert "consolidated.00.pth" not in models.sent
    assert "meta/Lonely has no config.json, and there is no meta/Lonely-hf" in run("scan", "meta/Lonely").fault


def test_an_adapter_s_base_model_is_fetched_from_the_hub(models: hub.Hub, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    ran = run("scan", tmp_path, "--json")
    assert ran.document["model"] == "some/model"
    assert "is a PEFT adapter; its base model some/model was scanned" in ran.err


def test_a_hub_that_cannot_be_reached_says_how_to_use_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        use(endpoint, tmp_path, monkeypatch)
        fault = run("scan", "some/model").fault
    assert f"{endpoint} cannot be reached" in fault
    assert "some/model is not in the cache" in fault
    assert "hf download some/model --local-dir" in fault


def test_offline_mode_says_the_same(tmp_path: Path, models: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("scan", "some/model").fault.startswith("HF_HUB_OFFLINE is set and some/model is not in the cache")
    assert run("scan", "gone").fault.startswith("there is no folder gone here, HF_HUB_OFFLINE is set and gone is not")
    assert models.sent == []


def test_a_missing_shard_is_a_damaged_checkpoint(models: hub.Hub, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != "model-00003-of-00009.safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    models.repos["some/model"] = copy
    fault = run("scan", "some/model").fault
    assert "model-00003-of-00009.safetensors, which is not there" in fault


def test_the_environment_s_endpoint_and_cache_are_used(models: hub.Hub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": models.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    ran = run_apart("scan", "some/model", "--json", **environment)
    assert ran.document["revision"] == hub.COMMIT
    assert ran.err == ""
    assert list((tmp_path / "home").glob("hub/models--some--model/snapshots/*/config.json"))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between attempts."""
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)


@pytest.mark.parametrize("where", ["info", "config.json", SHARD])
@pytest.mark.parametrize("status", [500, 502, 503, 504])
@pytest.mark.usefixtures("hurried")
def test_a_hub_that_fails_for_a_moment_is_asked_again(models: hub.Hub, where: str, status: int) -> None:
    models.failing[where] = [status]
    ran = run("scan", "some/model", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert models.failing[where] == []


STATUSES = {
    401: "answered 401 Unauthorized (log in with `hf auth login`",
    403: "answered 403 Forbidden (log in with `hf auth login`",
    429: "answered 429 Too Many Requests (wait a few minutes",
    500: "answered 500 Internal Server Error (try again later)",
    503: "answered 503 Service Unavailable (try again later)",
    599: "answered 599 (try again later)",
}


@pytest.mark.parametrize("where", ["info", "config.json", SHARD])
@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.usefixtures("hurried")
def test_a_refusal_is_told_by_its_status(models: hub.Hub, where: str, status: int) -> None:
    models.failing[where] = [status] * 99
    fault = run("scan", "some/model").fault
    assert STATUSES[status] in fault or (status == 401 and "if it is private: `hf auth login`" in fault)
    assert "cannot be reached" not in fault


ANSWERS = {
    "a captive portal": (b"<html><body>Log in</body></html>", "a proxy or the login page of a network"),
    "an empty page": (b"", "a proxy or the login page of a network"),
    "a list": (b"[]", "gave an answer that huggingface_hub does not accept"),
    "an object of something else": (b"{}", "gave an answer that huggingface_hub does not accept"),
    "a nested answer": (b"[" * 100_000, "gave an answer that huggingface_hub does not accept"),
    "no text": (b"\xff\xfe", "could not be fetched"),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.usefixtures("hurried")
def test_whatever_answers_in_a_hub_s_place_is_one_line(models: hub.Hub, name: str) -> None:
    body, words = ANSWERS[name]
    models.everything = 200, {"Content-Type": "text/html"}, body
    for model in ("some/model", "gpt2"):
        fault = run("scan", model).fault
        assert words in fault
        assert models.endpoint in fault


LISTED = {
    "a name with ..": {"path": "../../evil.json", "size": 3},
    "an absolute name": {"path": "/etc/evil.json", "size": 3},
    "a name with NUL": {"path": "a\0.json", "size": 3},
    "an absurd size": {"path": "huge.json", "size": 10**30},
    "no size": {"path": "huge.json", "size": "x"},
    "no name": {"path": None, "size": 3},
    "a long name": {"path": "x" * 300 + ".json", "size": 3},
}


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.usefixtures("hurried")
def test_absurd_entries_of_a_repository_are_one_line(models: hub.Hub, name: str) -> None:
    models.listed.append({"type": "file", "oid": "0" * 40, **LISTED[name]})
    ran = run("scan", "some/model")
    assert ran.code in (0, 1)  # the client may pass over what it cannot use
    assert ran.code == 0 or "could not be fetched" in ran.fault or "not in the cache" in ran.fault


@pytest.mark.usefixtures("hurried")
def test_an_adapter_s_repository_with_a_configuration_is_an_adapter_unless_it_has_weights(
    models: hub.Hub, folder: Path, tmp_path: Path
) -> None:
    made: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    made.save_pretrained(tmp_path / "adapter")
    shutil.copy(folder / "config.json", tmp_path / "adapter")
    models.repos["some/adapter"] = tmp_path / "adapter"
    models.repos["some/both"] = Path(shutil.copytree(tmp_path / "adapter", tmp_path / "both"))
    save_file(AutoModelForCausalLM.from_pretrained(folder).state_dict(), tmp_path / "both" / "model.safetensors")
    assert locate("some/adapter").adapter is not None
    found = locate("some/both")
    assert found.adapter is None
    assert "is a whole model with the files of a PEFT adapter beside it" in found.notes[0]
    assert "model.safetensors" not in models.sent


@pytest.mark.usefixtures("hurried")
def test_loading_whole_asks_again_for_a_shard_as_well(models: hub.Hub, folder: Path) -> None:
    models.failing[SHARD] = [503]
    assert tiny.digest(load("some/model").base) == tiny.digest(load(str(folder)).base)
