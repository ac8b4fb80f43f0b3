"""MacDrop: dropout on pre-trained massive weights while an adapter is trained.

Source: Oh, Shin, Oh, "House of Cards" (arXiv 2410.01866v2), Algorithm 1. For one optimizer
step t of T each entry of the k rows of ``W_up`` and ``W_gate``, (k, H) both, is zero with
probability p(t), by one mask ``rand(k, H) > p`` for both and without rescaling; then the
rows are put back bit for bit. Only frozen weights are touched, never the adapter.

`mwtool.MacDropCallback` does this in `transformers.Trainer` and TRL's trainers; any other
loop uses the engine:

    macdrop = MacDrop(model, massive, "step:0.8", steps=1000)
    for t, batch in enumerate(batches, start=1):
        with macdrop.step(t):
            model(**batch).loss.backward()
        optimizer.step()

Inside a step everything that reads the weights sees the dropped rows, whatever the mode: an
evaluation, and also a reference computed with the adapter disabled, as preference training
does. Only a state dict has the pre-trained ones. DoRA's norm sees them too: it divides by
the norm of what is left, which gives the row back by about 1/sqrt(1-p).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN, DecoderLayer
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers, ffn_at, unwrapped
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.interrupts import uninterrupted
from mwtool.macdrop.curriculum import Curriculum
from mwtool.macdrop.curriculum_yaml import read_curriculum
from mwtool.macdrop.masked_rows import Place, RecomputedRows, WrittenRows, rows_of_matrix

if TYPE_CHECKING:
    from mwtool.massive import RankedRows

log = logging.getLogger(__name__)


class MacDrop:
    """The engine: drops entries for a step and puts them back (Algorithm 1 of the paper).

    model: transformers model, wrapped by PEFT, DDP, FSDP2 or torch.compile or not; its massive rows must be frozen.
    massive: which rows, as a scan finds them, of one layer (the paper) or of several. curriculum: a line, a file's
        name, or a Curriculum; where it names layers, entries are dropped from the rows of these alone.
    steps: optimizer steps of the run, T; per_epoch: of one epoch, all of them by default.
    layers: where the FFNs are; by default as the adapter installed for the model's type says.

    p: of the step at hand, or of the last one. history: p of every step so far, by t. rows: the R rows' indices, of
    one layer after the other; places: the same by layer.
    Raises BadValue where there are no massive weights, the rows do not exist, are themselves trained, or the phases
    do not fit into the steps; UnsupportedModel where rows cannot be reached: FSDP1, ZeRO-3, offloaded weights,
    quantized ones under DoRA or torch.compile or by another library than bitsandbytes.
    """

    def __init__(
        self,
        model: nn.Module,
        massive: RankedRows | Sequence[RankedRows] | None,
        curriculum: Curriculum | str,
        *,
        steps: int,
        per_epoch: int | None = None,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> None:
        if massive is None or (isinstance(massive, Sequence) and not massive):
            raise BadValue("the model has no massive weights; there is nothing for MacDrop to drop: train without it")
        self.curriculum = read_curriculum(curriculum) if isinstance(curriculum, str) else curriculum
        self.steps, self.per_epoch = steps, per_epoch
        self.curriculum.values(steps, per_epoch)  # phases that do not fit are found now, not in the middle
        _refuse_wrapper(model)
        self.model, base = model, unwrapped(model)
        self.places = [
            _dropped_from(base, one, self.curriculum, layers)
            for one in chosen_places(massive if isinstance(massive, Sequence) else [massive], self.curriculum)
        ]
        self.rows = [row for place in self.places for row in place.rows]
        self.matrices = [matrix for place in self.places for matrix in place.matrices]
        if any(_compiled(module) for module in model.modules()):
            self.refuse_compiled()
        self.p, self.history = 0.0, dict[int, float]()
        self._t, self._microbatch, self._dropped = 0, 0, False
        log.info("%s", self)

    @property
    def ffn(self) -> FFN:
        """The network of the first place."""
        return self.places[0].ffn

    @property
    def how(self) -> str:
        """`weights` where rows are written, `outputs` where what they give is computed again (quantized)."""
        return self.places[0].how

    @property
    def kept_bytes(self) -> int:
        """Extra memory: the copy of the rows."""
        return sum(matrix.kept_bytes for matrix in self.matrices)

    def refuse_compiled(self) -> None:
        """Raises UnsupportedModel if the model, which is compiled or will be, would not see what is dropped."""
        packed = next((place.ffn for place in self.places if place.how == "outputs"), None)
        if packed is not None:
            raise UnsupportedModel(
                f"{packed.module} is quantized, and torch.compile ignores hooks set after it; train uncompiled"
            )

    @contextmanager
    def step(self, t: int) -> Iterator[MacDrop]:
        """Optimizer step `t`, from 1: entries are dropped inside the block, however it ends."""
        try:
            try:
                self.begin(t)
                yield self
            finally:
                self.restore()
        finally:
            self.restore()  # nothing, unless Ctrl-C came before the first had begun

    def begin(self, t: int) -> None:
        """Drop the entries of step `t`, from 1; to be followed by `restore`.

        Raises BadValue if t is outside 1 to `steps`, an adapter is merged into the rows, or another engine drops
        from them.
        """
        self.p = self.curriculum.p(t, self.steps, self.per_epoch)
        self._t, self._microbatch = t, 0
        self.history[t] = self.p
        self._drop()

    def next_microbatch(self) -> None:
        """Another mask where the curriculum resamples by micro-batch; nothing otherwise."""
        self._microbatch += 1
        if self.curriculum.resample == "microbatch":
            self._drop()

    def restore(self) -> None:
        """Put every row back, bit for bit, and whole even if Ctrl-C comes in the middle."""
        if self._dropped:
            uninterrupted(self._restore)

    def mask(self, t: int, microbatch: int = 0, place: int = 0) -> Tensor:
        """Which entries stay, (matrices, R, H) or (1, R, H) if shared: a function of its arguments and the seed alone.

        place: which of `places`; masks of different places are independent.
        """
        key = f"{self.curriculum.seed}:{t}:{microbatch}" + (f":{place}" if place else "")
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()))
        one = self.places[place]
        count = len(one.matrices) if self.curriculum.masks == "separate" else 1
        drawn = torch.rand((count, len(one.rows), one.matrices[0].width), generator=generator)
        return drawn > self.curriculum.p(t, self.steps, self.per_epoch)

    def __str__(self) -> str:
        return f"MacDrop {self.curriculum} on {'; '.join(map(str, self.places))}"

    def _drop(self) -> None:
        if self.p <= 0:
            self.restore()
            return
        masks = [self.mask(self._t, self._microbatch, at) for at in range(len(self.places))]
        self._dropped = True
        for place, mask in zip(self.places, masks, strict=True):
            for matrix, keep in zip(place.matrices, mask.expand(len(place.matrices), -1, -1), strict=True):
                matrix.drop(keep)
        self._gather_again()

    def _restore(self) -> None:
        for matrix in self.matrices:
            matrix.restore()
        self._gather_again()
        self._dropped = False

    def _gather_again(self) -> None:
        """Where FSDP2 keeps weights gathered between forwards, let go of them: the next one gathers what is written."""
        if not any(matrix.gathered for matrix in self.matrices):
            return
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@dataclass(frozen=True, slots=True)
class Dropped:
    """Rows of one FFN that entries are dropped from, and its matrices: up, then gate if there is one."""

    ffn: FFN
    rows: list[int]
    matrices: list[WrittenRows | RecomputedRows]

    @property
    def how(self) -> str:
        """`weights` or `outputs`, as `MacDrop.how`."""
        return self.matrices[0].how

    def __str__(self) -> str:
        shown = ", ".join(str(row) for row in self.rows[:5]) + (" ..." if len(self.rows) > 5 else "")  # noqa: PLR2004 - enough for a line
        return f"{self.ffn.module}, {len(self.rows)} rows ({shown}), by {self.how}"


def chosen_places(given: Sequence[RankedRows], curriculum: Curriculum) -> list[RankedRows]:
    """The places the curriculum drops from: those given, or those of them in its layers.

    Raises BadValue where one of its layers has no rows given, or a network is given twice.
    """
    lacking = [layer for layer in curriculum.layers if layer not in {one.layer for one in given}]
    if lacking:
        has = ", ".join(str(one.layer) for one in given)
        raise BadValue(f"the curriculum names layer {lacking[0]}, whose rows are not given; given are those of {has}")
    places = [one for one in given if not curriculum.layers or one.layer in curriculum.layers]
    keys = [(one.layer, one.expert) for one in places]
    if len(set(keys)) < len(keys):
        layer, _ = next(key for key in keys if keys.count(key) > 1)
        raise BadValue(f"rows of layer {layer} are given twice; give each network once, with all its rows")
    return places


def _dropped_from(
    base: nn.Module, rows: RankedRows, curriculum: Curriculum, layers: Sequence[DecoderLayer] | None
) -> Dropped:
    ffn = _network(base, rows, layers)
    for place in ffn.inputs:
        Place(base, place)  # refuses what has no rows to count
    chosen = chosen_rows(rows, curriculum, ffn.width(base))
    return Dropped(ffn, chosen, [rows_of_matrix(base, place, chosen) for place in ffn.inputs])


def chosen_rows(massive: RankedRows, curriculum: Curriculum, width: int) -> list[int]:
    """The rows of the curriculum's scope, of `width`; raises BadValue where k were not ranked or do not exist."""
    if curriculum.k > len(massive.indices):
        raise BadValue(
            f"the curriculum asks for k = {curriculum.k} rows; the scan ranked {len(massive.indices)}: "
            f"scan with -k {curriculum.k}"
        )
    top = list(massive.indices[: curriculum.k])
    if not all(0 <= row < width for row in top):
        raise BadValue(f"rows {top} do not all exist; {massive.module} has rows 0 to {width - 1}: scan this model")
    if curriculum.scope == "massive":
        return top
    return [row for row in range(width) if curriculum.scope == "all" or row not in set(top)]


def _network(base: nn.Module, massive: RankedRows, layers: Sequence[DecoderLayer] | None) -> FFN:
    config: Any = base.config
    if layers is None:
        layers = decoder_layers(adapter_for(config.model_type), config)
    return ffn_at(tuple(layers), massive.layer, massive.expert)


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _refuse_wrapper(model: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedModel(
            "the model is wrapped by FSDP1 (FullyShardedDataParallel), which flattens weights; use FSDP2 "
            "(fsdp_version: 2) or DDP to train with MacDrop"
        )
