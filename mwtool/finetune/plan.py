"""A fine-tuning run before it begins: data read and encoded, rows found, steps counted; no weights in memory yet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.finetune.config import FEW, LENGTH, Asked, Recipe
from mwtool.finetune.data import Data, read_data
from mwtool.finetune.kernels import refuse_together
from mwtool.finetune.sequences import REASONS, Encoded, LeftOut, split
from mwtool.finetune.tokenize import encode, named
from mwtool.massive import RankedRows, load_massive
from mwtool.models.identity import identity_of
from mwtool.models.load import Loaded
from mwtool.models.meta_model import empty_model
from mwtool.models.source import Source
from mwtool.scan.scanner import OnLayer, scan_checkpoint
from mwtool.scan.settings import Choice, Settings
from mwtool.scan.targets import find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What became of the records of the training data.

    read: how many could be read; trained: how many of them are trained on, at least in part; cut: how many of those
    lose their last messages. left_out: those that were read and are not trained on. unreadable: those that could not
    be read, or that the chat template does not write; each with its file, line and reason.
    """

    read: int
    trained: int
    cut: int
    left_out: tuple[LeftOut, ...]
    unreadable: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """How many records there are of each kind, by the keys of `data` in docs/json.md."""
        return {
            "rows": self.read,
            "trained_rows": self.trained,
            "cut": self.cut,
            "unreadable": len(self.unreadable),
            **{reason: sum(one.reason == reason for one in self.left_out) for reason in REASONS},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is known before training.

    skeleton: the model without memory for its weights. data: what was read. digest: of the sequences: the same if they
    are. records: what became of the records. places: the rows to drop from, of one layer or of several; empty if
    MacDrop is not wanted, or if there are no massive rows and that was allowed. date: the day that the chat template
    writes, if it writes one.
    """

    source: Source
    skeleton: PreTrainedModel
    recipe: Recipe
    data: Data
    train: Encoded
    held: Encoded | None
    digest: str
    records: Records
    places: tuple[RankedRows, ...]
    processes: int
    notes: tuple[str, ...]
    date: datetime | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.recipe.steps(len(self.train), self.processes)[0]

    @property
    def per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.recipe.steps(len(self.train), self.processes)[1]

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with for the run to continue from it."""
        places = [[one.module, one.expert, list(one.indices)] for one in self.places]
        rows: Any = None if not places else places[0] if len(places) == 1 else places
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "data": self.digest,
            "rows": rows,
            "processes": self.processes,
            **({} if self.date is None else {"date": self.date.isoformat()}),
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
        chat_template=asked.chat_template,
        date=asked.date,
    )
    trained, held = split(encoded, recipe.eval_share, recipe.seed)
    notes += encoded.notes
    records = _records(data, encoded)
    if records.unreadable:
        shown = named(records.unreadable)
        notes += (f"{len(records.unreadable):,} records that cannot be read are left out: {shown}",)
    if encoded.date is not None:
        notes += (f"the chat template writes the date, {encoded.date:%Y-%m-%d}: it stays that of this run",)
    places, found = _rows(source, skeleton, recipe, asked, on_layer)
    plan = Plan(
        source=source,
        skeleton=skeleton,
        recipe=recipe,
        data=data,
        train=trained,
        held=held,
        digest=_digest(encoded),
        records=records,
        places=places,
        processes=processes,
        notes=notes + found,
        date=encoded.date,
    )
    recipe.curriculum.values(plan.steps, plan.per_epoch)  # phases that do not fit are found now
    return plan


def few_steps(plan: Plan) -> tuple[str, ...]:
    """What to say where data and effective batch give so few steps that hardly anything is learned."""
    recipe, steps = plan.recipe, plan.steps
    if recipe.max_steps is not None or steps >= FEW:
        return ()
    epochs = f"{recipe.epochs:g} epoch{'s' if recipe.epochs != 1 else ''}"
    follow = f"only {steps} steps follow" if steps > 1 else "only 1 step follows"
    said = (
        f"{follow} from {len(plan.train):,} sequences, an effective batch of {recipe.effective_batch} and {epochs}: "
        f"lower --effective-batch, or raise --epochs"
    )
    return (said,)


def _records(data: Data, encoded: Encoded) -> Records:
    read = len(data.examples) - len(encoded.refused)
    return Records(
        read=read,
        trained=read - len(encoded.left_out),
        cut=encoded.cut,
        left_out=encoded.left_out,
        unreadable=tuple(one.why for one in (*data.unreadable, *encoded.refused)),
    )


def _check_possible(source: Source, recipe: Recipe, processes: int) -> None:
    """What can be said against a run before anything is read."""
    if source.adapter is not None:
        raise BadValue(
            f"{source.adapter} is a PEFT adapter, and training begins with a new one: give its base model {source.name}"
        )
    if source.gguf is not None:
        source.gguf.refuse_rotary_fault()
    recipe.accumulation(processes)
    refuse_together(recipe, processes)
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
        here = Loaded(model=skeleton, base=skeleton, tokenizer=None, source=source, layers=layers)
        groups, notes = find_targets(
            here,
            choice,
            recipe.curriculum.k,
            Settings(k=recipe.curriculum.k),
            scanned=partial(scan_checkpoint, source, on_layer=on_layer),
        )
        return groups[0], notes
    if asked.massive is not None:
        saved = load_massive(
            asked.massive, identity_of(source.name, source.revision, skeleton.config, layers, skeleton)
        )
        massive, notes = saved.massive, saved.notes
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
