"""A fine-tuning run before it begins: data read and encoded, rows found, steps counted; no weights in memory yet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.finetune.config import Recipe
from mwtool.finetune.data import Data, Form, read_data
from mwtool.finetune.tokenize import Encoded, encode, split
from mwtool.massive import RankedRows, load_massive
from mwtool.models.identity import identity_of
from mwtool.models.load import Loaded
from mwtool.models.meta_model import empty_model
from mwtool.models.source import Source
from mwtool.scan.scanner import OnLayer, Settings, scan_checkpoint
from mwtool.scan.targets import Choice, find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 1024
"""Tokens of a sequence where neither the user nor the model says less."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What to train on, and where the rows come from.

    massive: a saved scan; None: the model is scanned. allow_none: train without MacDrop where there are no rows.
    choice: rows of other places than the massive layer; its `file` is not read, but `massive`.
    """

    data: str
    form: Form | None = None
    split: str = "train"
    skip_bad: bool = False
    massive: Path | None = None
    allow_none: bool = False
    choice: Choice = field(default_factory=Choice)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is known before training.

    skeleton: the model without memory for its weights. data: what was read. digest: the same where the sequences are.
    too_long: examples left out because they do not fit into a sequence; unreadable: rows left out.
    places: the rows to drop from, of one layer or of several; empty where MacDrop is not wanted, or there is nothing
        to drop from and that was allowed.
    """

    source: Source
    skeleton: PreTrainedModel
    recipe: Recipe
    data: Data
    train: Encoded
    held: Encoded | None
    digest: str
    too_long: int
    unreadable: int
    places: tuple[RankedRows, ...]
    processes: int
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.recipe.steps(len(self.train), self.processes)[0]

    @property
    def per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.recipe.steps(len(self.train), self.processes)[1]

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to be gone on from."""
        places = [[one.module, one.expert, list(one.indices)] for one in self.places]
        rows: Any = None if not places else places[0] if len(places) == 1 else places
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "data": self.digest,
            "rows": rows,
            "processes": self.processes,
            **self.recipe.document(),
        }


def make_plan(
    source: Source, recipe: Recipe, asked: Asked, *, processes: int = 1, on_layer: OnLayer | None = None
) -> Plan:
    """Read everything and refuse what cannot be trained, before the weights are loaded.

    Raises BadValue, ModelNotFound, or what the model's files give reason to.
    """
    _check_possible(source, recipe, processes)
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise BadValue(f"{source.name} has no tokenizer; training needs one to read text")
    skeleton = empty_model(source)
    recipe, notes = _fitting_length(recipe, skeleton)
    data = read_data(asked.data, asked.form, split=asked.split, skip_bad=asked.skip_bad)
    assert recipe.max_length is not None
    encoded = encode(
        data,
        tokenizer,
        recipe.max_length,
        on_prompt=recipe.on_prompt,
        packing=recipe.packing,
        skip_bad=asked.skip_bad,
    )
    trained, held = split(encoded, recipe.eval_share, recipe.seed)
    notes += encoded.notes
    unreadable = (*data.unreadable, *encoded.refused)
    if unreadable:
        more = f", and {len(unreadable) - 1:,} more" if len(unreadable) > 1 else ""
        notes += (f"rows that cannot be read are left out: {unreadable[0].why}{more}",)
    places, found = _rows(source, skeleton, recipe, asked, on_layer)
    plan = Plan(
        source,
        skeleton,
        recipe,
        data,
        trained,
        held,
        _digest(encoded),
        encoded.too_long,
        len(unreadable),
        places,
        processes,
        notes + found,
    )
    recipe.curriculum.values(plan.steps, plan.per_epoch)  # phases that do not fit are found now
    return plan


def _check_possible(source: Source, recipe: Recipe, processes: int) -> None:
    """What can be said against a run before anything is read."""
    if source.adapter is not None:
        raise BadValue(
            f"{source.adapter} is a PEFT adapter, and training begins with a new one: give its base model {source.name}"
        )
    if source.gguf is not None:
        source.gguf.refuse_rotary_fault()
    recipe.accumulation(processes)
    if recipe.quantize and recipe.peft == "dora" and not recipe.curriculum.idle:
        raise UnsupportedModel(
            "DoRA's norm reads the rows, which are packed under --quantize, and MacDrop cannot drop from them there: "
            "use --peft lora, or leave out --quantize"
        )


def _fitting_length(recipe: Recipe, model: PreTrainedModel) -> tuple[Recipe, tuple[str, ...]]:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = most if isinstance(most, int) else None
    asked = recipe.max_length or LENGTH
    if most is None or asked <= most:
        return replace(recipe, max_length=asked), ()
    said = (f"--max-length {asked} is shortened to the {most} positions the model has",) if recipe.max_length else ()
    return replace(recipe, max_length=most), said


def _rows(
    source: Source, skeleton: PreTrainedModel, recipe: Recipe, asked: Asked, on_layer: OnLayer | None
) -> tuple[tuple[RankedRows, ...], tuple[str, ...]]:
    if recipe.curriculum.idle:
        return (), ()
    layers = tuple(decoder_layers(adapter_for(skeleton.config.model_type), skeleton.config))
    choice = replace(asked.choice, layers=asked.choice.layers or recipe.curriculum.layers, file=asked.massive)
    if choice != Choice(file=asked.massive):
        here = Loaded(skeleton, skeleton, None, source, layers)
        groups, notes = find_targets(
            here,
            choice,
            recipe.curriculum.k,
            Settings(k=recipe.curriculum.k),
            scanned=partial(scan_checkpoint, source, on_layer=on_layer),
        )
        return groups[0], notes
    if asked.massive is not None:
        massive, warnings = load_massive(
            asked.massive, identity_of(source.name, source.revision, skeleton.config, layers, skeleton)
        )
        notes = tuple(warnings)
    else:
        scan = scan_checkpoint(source, Settings(k=recipe.curriculum.k), on_layer=on_layer)
        massive, notes = scan.massive, scan.notes
    if massive is not None:
        return (massive,), notes
    if not asked.allow_none:
        raise BadValue(
            f"{source.name} has no massive weights, so there is nothing for MacDrop to drop: give --massive FILE, or "
            f"train without MacDrop with --allow-none"
        )
    return (), (*notes, f"{source.name} has no massive weights; it is trained without MacDrop")


def _digest(encoded: Encoded) -> str:
    state = hashlib.sha256(repr(encoded.lengths).encode())
    for ids, labels in zip(encoded.ids, encoded.labels, strict=True):
        state.update(ids.numpy().tobytes())
        state.update(labels.numpy().tobytes())
    return state.hexdigest()[:16]
