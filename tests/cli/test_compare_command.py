"""`mwtool compare` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from command import run
from peft import LoraConfig, get_peft_model
from words import planted_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model") / "base", num_hidden_layers=4)


@pytest.fixture(scope="module")
def scan(folder: Path) -> Path:
    path = folder.parent / "scan.json"
    assert run("scan", folder, "-o", path).code == 0
    return path


def test_a_model_and_its_saved_scan_are_the_same(folder: Path, scan: Path, tmp_path: Path) -> None:
    ran = run("compare", scan, folder, "--json", "-o", tmp_path / "compare.json")
    assert (ran.code, ran.out) == (0, (tmp_path / "compare.json").read_text())
    document = ran.document
    assert document["schema"] == "mwtool.compare/1"
    assert [row["fate"] for row in document["massive"]] == ["kept"]
    assert (document["a"]["name"], document["b"]["name"]) == (str(scan), str(folder))
    assert document["command"].startswith("mwtool compare ")


def test_an_adapter_is_merged_before_it_is_scanned(folder: Path, tmp_path: Path) -> None:
    """The one here removes the massive row, which a scan of its base model alone would still find."""
    model = get_peft_model(tiny.opened(folder), LoraConfig(r=1, target_modules=["up_proj"], layers_to_transform=[1]))
    up = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    with torch.no_grad():
        row = up.base_layer.weight[17]
        up.lora_B["default"].weight.zero_()
        up.lora_B["default"].weight[17] = -1.0
        up.lora_A["default"].weight.copy_(row[None] / up.scaling["default"])
    model.save_pretrained(tmp_path / "adapter")
    document = run("compare", folder, tmp_path / "adapter", "--json").document
    assert document["massive"] == []
    assert document["said"][0].startswith("The massive layer of A is 1; B has none")


def test_it_says_in_the_terminal_what_follows(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = run("compare", scan, scan)
    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "The massive layer is 1 in both" in ran.out


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("absent.json", None, "does not exist; expected a document that `mwtool scan -o` writes"),
        ("other.json", '{"schema": "mwtool.eval/1"}', "has schema 'mwtool.eval/1'; expected 'mwtool.scan/2'"),
        ("damaged.json", "{", "is not JSON"),
    ],
)
def test_what_is_no_scan_is_refused_in_one_line(
    scan: Path, tmp_path: Path, name: str, text: str | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    ran = run("compare", scan, tmp_path / name)
    assert ran.code == 1
    assert expected in ran.fault


def test_both_places_are_needed(scan: Path) -> None:
    assert run("compare", scan).code == 2
