"""Models on the Hub: found, fetched no further than needed, kept, and refused in one line each."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import hub
import pytest
import tiny
import torch
from command import run, run_apart
from huggingface_hub import constants, utils


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


def use(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME do, after huggingface_hub was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def shards(names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".safetensors")}


def test_a_model_is_scanned_by_id_and_only_the_shards_it_needs_are_fetched(models: hub.Hub, folder: Path) -> None:
    found = run("scan", "some/model", "--layers", "0-5", "--json")
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
