"""`--push-to-hub`: what reaches the Hub, a server on 127.0.0.1, and what is refused before any work is done."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import uploads
from command import run
from huggingface_hub import constants, utils
from words import planted_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("secret-place") / "base", num_hidden_layers=4)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[uploads.Uploads]:
    with uploads.receiving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield served
    utils.close_session()


def test_a_scan_is_a_dataset_with_a_card_that_names_no_folder_of_this_machine(
    hub: uploads.Uploads, folder: Path
) -> None:
    ran = run("scan", folder, "--push-to-hub", "some/scan")
    assert ran.code == 0, ran.err
    assert f"the scan is at {hub.endpoint}/datasets/some/scan" in ran.err
    assert hub.made == {"datasets/some/scan": False}
    files = {name.rpartition("/")[2]: content.decode() for name, content in hub.files.items()}
    assert set(files) == {"scan.json", "README.md"}
    assert all("secret-place" not in content for content in files.values())
    document = json.loads(files["scan.json"])
    assert (document["model"], document["massive"]["layer"], document["command"]) == ("base", 1, None)
    assert "**Massive layer 1**" in files["README.md"]
    assert "base_model" not in files["README.md"]  # the Hub knows no folders


def test_what_was_pushed_is_a_scan_that_other_commands_take(hub: uploads.Uploads, folder: Path, tmp_path: Path) -> None:
    assert run("scan", folder, "--push-to-hub", "some/scan", "-o", tmp_path / "own.json").code == 0
    (tmp_path / "hub.json").write_bytes(hub.files["datasets/some/scan/scan.json"])
    compared = run("compare", tmp_path / "own.json", tmp_path / "hub.json", "--json").document
    assert [row["fate"] for row in compared["massive"]] == ["kept"]


def test_an_adapter_is_a_model_without_its_checkpoints(hub: uploads.Uploads, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n\n".join(f"w{n} w{n + 1} w3" for n in range(24)))
    options = ("--max-steps", 2, "--batch-size", 4, "--effective-batch", 4, "--device", "cpu", "--save-steps", 1)
    ran = run(
        "finetune", folder, "--data", tmp_path / "t.txt", "-o", tmp_path / "out", *options,
        "--push-to-hub", "some/adapter", "--hub-private-repo",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert hub.made == {"models/some/adapter": True}
    names = {name.removeprefix("models/some/adapter/") for name in hub.files}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "macdrop.json", "training.png"} <= names
    assert not [name for name in names if "checkpoint" in name]
    weights = hub.files["models/some/adapter/adapter_model.safetensors"]
    assert weights == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()


def test_nothing_is_asked_of_the_hub_without_the_option(hub: uploads.Uploads, folder: Path) -> None:
    assert run("scan", folder).code == 0
    assert hub.paths == []


def test_a_refusal_comes_before_the_scan_and_in_one_line(hub: uploads.Uploads, folder: Path) -> None:
    hub.refusing = 403
    ran = run("scan", folder, "--push-to-hub", "some/scan")
    assert (ran.code, ran.out) == (1, "")
    assert "some/scan cannot be written: " in ran.fault
    assert ran.fault.endswith("log in with `hf auth login`, with a token that may write there")


def test_a_hub_that_is_not_there_is_one_line(
    hub: uploads.Uploads, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        ran = run("scan", folder, "--push-to-hub", "some/scan")
    assert (ran.code, ran.out) == (1, "")
    assert "cannot be written: " in ran.fault


def test_switched_off_and_badly_named_it_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in run("scan", folder, "--push-to-hub", "some/scan").fault
    assert "'a/b/c' is no name of a repository" in run("scan", folder, "--push-to-hub", "a/b/c").fault
    assert run("scan", folder, "--hub-private-repo").code == 2
    dry = ("--data", folder / "text.txt", "--dry-run", "--push-to-hub", "some/adapter")
    assert run("finetune", folder, *dry).code == 2
