"""What a fine-tuning run leaves beside its adapter: figure, model card, merged checkpoint, and last its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mwtool.files.atomic_write import write
from mwtool.files.document import text_of
from mwtool.files.figure import save_figure
from mwtool.finetune.document import RECORD, model_card
from mwtool.finetune.plot import plot_training
from mwtool.finetune.trainer import Trained
from mwtool.models.load import load
from mwtool.models.rewrite import save_merged

FIGURE, MERGED = "training.png", "merged"
PUBLISHED = ("adapter_*", "README.md", RECORD, FIGURE, "tokenizer*", "special_tokens_map.json", "chat_template.jinja")
"""What is uploaded of the folder: neither checkpoints nor the merged model."""


def leave(document: dict[str, Any], trained: Trained, folder: Path, *, merge: bool = False) -> None:
    """Write everything for a run whose adapter is in `folder`; the record says that all is there.

    document: as `finetune_document` makes it. Raises OutputError where it cannot be written.
    """
    save_figure(plot_training(document), folder / FIGURE)
    base = trained.model.peft_config["default"].base_model_name_or_path
    write(folder / "README.md", model_card(document, str(base)))
    if merge and not (folder / MERGED).exists():  # there, whole, where a killed run had come that far
        save_merged(load(str(folder), on="merged"), folder / MERGED)
    write(folder / RECORD, text_of(document))
