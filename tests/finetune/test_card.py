"""The model card is published with the adapter: it names no folder of the machine that the adapter was made on."""

from __future__ import annotations

from pathlib import Path

from every_document import training

from mwtool.finetune.document import model_card

MASSIVE = {"layer": 1, "module": "model.layers.1.mlp", "expert": None, "indices": [148, 346]}
NOTES = [
    "/home/me/runs/scan.json was made with demo; it is used for model",
    "3 examples are left out: /data/private/a.json, line 2; (C:\\Users\\me\\b.json, line 7); '~/c.json'",
    "see https://example.org/some/page; LoRA/DoRA, </s> and 1/2 stay, and so does path/to/model",
]


def test_absolute_paths_in_notes_lose_their_folders_and_nothing_else_does(tmp_path: Path) -> None:
    base = tmp_path / "a model"
    base.mkdir()
    document = {**training(MASSIVE), "model": str(base), "notes": NOTES}
    card = model_card(document, str(base))
    assert str(tmp_path) not in card
    assert "- scan.json was made with demo; it is used for model" in card
    assert "left out: a.json, line 2; (b.json, line 7); 'c.json'" in card
    assert f"- {NOTES[2]}" in card
    assert "https://arxiv.org/abs/2410.01866" in card
    assert '"path/to/a model"' in card
