"""The training curves as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mwtool.files.figure import BLUE, GREEN, VERMILION, count_axis, document_of, model_name, panels, styled
from mwtool.finetune.config import SCHEMA

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_training(run: Mapping[str, Any]) -> Figure:
    """Loss and held-out loss over the optimizer steps, and below them p of each step where MacDrop dropped (Figure 7).

    run: the document of a fine-tuning run, as `macdrop.json` holds it. Raises BadValue for another document.
    """
    document = document_of(run, SCHEMA)
    p = document["p"]
    with styled():
        figure, axes = panels([1.9, 0.9] if p else [1.9], _caption(document))
        for key, label, style, color in (("loss", "training", "-", BLUE), ("eval_loss", "held out", "o--", VERMILION)):
            points = [(entry["step"], entry[key]) for entry in document["log"] if entry.get(key) is not None]
            if points:
                axes[0].plot(*zip(*points, strict=True), style, color=color, label=label)
        axes[0].set_title("Loss")
        axes[0].set(ylabel="nats a token")
        axes[0].legend()
        if p:
            axes[1].step(range(1, len(p) + 1), p, where="mid", color=GREEN)
            axes[1].set_title("MacDrop: probability that an entry is dropped")
            axes[1].set(ylabel="p", ylim=(-0.03, 1.03))
            axes[0].sharex(axes[1])
            axes[0].tick_params(labelbottom=False)
        axes[-1].set(xlabel="optimizer step")
        count_axis(axes[-1])
    return figure


def _caption(document: Mapping[str, Any]) -> str:
    settings = document["settings"]
    name = {"lora": "LoRA", "dora": "DoRA"}.get(settings["peft"], settings["peft"])
    said = f"{model_name(document)}, {name} of rank {settings['rank']}, learning rate {settings['lr']:g}"
    if not document["p"]:
        return f"{said}, without MacDrop."
    places = " and ".join(str(one["layer"]) for one in document["places"])
    rows = f"{len(document['rows'])} row{'' if len(document['rows']) == 1 else 's'}"
    return f"{said}; MacDrop {settings['curriculum']['schedule']} on {rows} of layer {places}."
