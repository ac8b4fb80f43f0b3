"""MacDrop: dropout on pre-trained massive weights while a PEFT adapter is trained.

Source: Oh, Shin, Oh, "House of Cards" (arXiv 2410.01866v2), Algorithm 1. During optimizer
step t of T, each entry of the k massive rows of ``W_up`` and ``W_gate``, (k, H) each, is set to
zero with probability p(t), without rescaling; both matrices share the mask ``rand(k, H) > p``.
After the step the rows are restored bit for bit. Only frozen weights are changed, never the
PEFT adapter.

`mwtool.MacDropCallback` does this in `transformers.Trainer` and TRL's trainers. Use the engine
in any other training loop:

    macdrop = MacDrop(model, massive, "step:0.8", steps=1000)
    for t, batch in enumerate(batches, start=1):
        with macdrop.step(t):
            model(**batch).loss.backward()
        optimizer.step()

Inside a step, the trained model sees the dropped rows, in training and in evaluation mode. A
state dict holds the pre-trained rows, and so does a forward pass with the PEFT adapter switched
off, or with another one active: the reference policy of preference training.
DoRA divides each row by its norm, which is that of the remaining entries: the row is scaled
up by about 1/sqrt(1-p).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN, DecoderLayer
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers, ffn_at, unwrapped
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.interrupts import restored, uninterrupted
from mwtool.macdrop.curriculum import Curriculum
from mwtool.macdrop.curriculum_yaml import read_curriculum
from mwtool.macdrop.masked_rows import MatrixRows, RecomputedRows, WrittenRows, masked_rows
from mwtool.macdrop.policy import Policy

if TYPE_CHECKING:
    from mwtool.massive import RankedRows

log = logging.getLogger(__name__)


class MacDrop:
    """Drops entries of the massive rows for one training step and restores them (paper, Algorithm 1).

    model: a transformers model, possibly wrapped by PEFT, DDP, FSDP2 or torch.compile; its massive rows must be frozen.
    massive: the rows of one layer (the paper) or of several, as found by a scan. curriculum: a schedule such as
    ``step:0.8``, the name of a YAML file, or a Curriculum; if it names layers, entries are dropped only there.
    steps: optimizer steps of the run, T. per_epoch: optimizer steps of one epoch; by default, T.
    layers: decoder layers and their FFNs; by default, as described by the architecture adapter installed for the
    model's type.

    Attributes: p, the probability of the current or most recent step; history, p of every step so far, by t; rows,
    the indices of the rows dropped from, layer by layer; places, the same for each FFN; seconds, what masking and
    restoring took so far, as this process saw it: it does not wait for a GPU.

    Raises BadValue if there are no massive weights, if rows do not exist or are trained themselves, or if the phases
    do not fit into the steps. Raises UnsupportedModel if the rows cannot be changed: under FSDP1 or ZeRO-3, offloaded,
    quantized under DoRA or torch.compile, or quantized by a library other than bitsandbytes.
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
            raise BadValue("the model has no massive weights for MacDrop to drop; train without MacDrop")
        self.curriculum = read_curriculum(curriculum) if isinstance(curriculum, str) else curriculum
        self.steps, self.per_epoch = steps, per_epoch
        self.curriculum.values(steps, per_epoch)  # raises now if the phases do not fit, not in the middle of the run
        _refuse_wrapper(model)
        self.model, base = model, unwrapped(model)
        self.places = [
            _dropped_from(base, one, self.curriculum, layers)
            for one in chosen_places(massive if isinstance(massive, Sequence) else [massive], self.curriculum)
        ]
        self.rows = [row for place in self.places for row in place.rows]
        self.matrices = [matrix for place in self.places for matrix in place.matrices]
        self.policy = Policy(base)
        for matrix in self.matrices:
            matrix.policy = self.policy
        if any(_compiled(module) for module in model.modules()):
            self.refuse_compiled()
        self.p, self.history = 0.0, dict[int, float]()
        self._t, self._microbatch, self._dropped = 0, 0, False
        self.seconds = 0.0
        log.info("%s", self)

    @property
    def ffn(self) -> FFN:
        """The FFN of the first place."""
        return self.places[0].ffn

    @property
    def how(self) -> str:
        """`weights` if the rows are written, `outputs` if their outputs are recomputed (quantized weights)."""
        return self.places[0].how

    @property
    def kept_bytes(self) -> int:
        """Extra memory in bytes: the copy of the rows."""
        return sum(matrix.kept_bytes for matrix in self.matrices)

    def refuse_compiled(self) -> None:
        """Raises UnsupportedModel if the dropped entries would have no effect on a compiled model.

        A compiled model is not told apart from its reference: hooks would break its graph.
        """
        for matrix in self.matrices:
            matrix.policy = None
        packed = next((place.ffn for place in self.places if place.how == "outputs"), None)
        if packed is not None:
            raise UnsupportedModel(
                f"{packed.module} is quantized, and torch.compile ignores hooks registered later; train without "
                f"torch.compile"
            )

    @restored
    def step(self, t: int) -> Iterator[MacDrop]:
        """Drop the entries of optimizer step `t`, from 1, inside the block; restore them when it ends.

        Raises BadValue as `begin` does.
        """
        try:
            try:
                self.begin(t)
                yield self
            finally:
                self.restore()
        finally:
            self.restore()  # does something only if Ctrl-C came before the first call began

    def begin(self, t: int) -> None:
        """Drop the entries of optimizer step `t`, from 1. Call `restore` afterwards.

        Raises BadValue if t is outside 1 to `steps`, if a PEFT adapter is merged into the rows, or if another engine
        has dropped entries of the same rows.
        """
        self.p = self.curriculum.p(t, self.steps, self.per_epoch)
        self._t, self._microbatch = t, 0
        self.policy.begin()
        self.history[t] = self.p
        self._drop()

    def next_microbatch(self) -> None:
        """Apply the next mask if the curriculum resamples for every micro-batch; else do nothing."""
        self._microbatch += 1
        if self.curriculum.resample == "microbatch":
            self._drop()

    def restore(self) -> None:
        """Restore every row bit for bit; Ctrl-C does not interrupt it halfway."""
        if self._dropped:
            start = time.perf_counter()
            uninterrupted(self._restore)
            self.seconds += time.perf_counter() - start

    def mask(self, t: int, microbatch: int = 0, place: int = 0) -> Tensor:
        """The entries to keep: (M, R, H) of bool for M matrices, (1, R, H) if they share the mask.

        It depends on the seed and the arguments alone. place: index in `places`, whose masks are independent.
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
        start = time.perf_counter()
        masks = [self.mask(self._t, self._microbatch, at) for at in range(len(self.places))]
        self._dropped = True
        for place, mask in zip(self.places, masks, strict=True):
            for matrix, keep in zip(place.matrices, mask.expand(len(place.matrices), -1, -1), strict=True):
                matrix.drop(keep)
        self._gather_again()
        self.seconds += time.perf_counter() - start

    def _restore(self) -> None:
        for matrix in self.matrices:
            matrix.restore()
        self._gather_again()
        self._dropped = False

    def _gather_again(self) -> None:
        """Free weights that FSDP2 keeps gathered between forwards: the next forward then gathers the changed ones."""
        if not any(matrix.gathered for matrix in self.matrices):
            return
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@dataclass(frozen=True, slots=True)
class Dropped:
    """Rows of one FFN to drop from, in its matrices: up, then gate if there is one."""

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
    """The rows to drop from: all that are given, or those in the layers of the curriculum.

    Raises BadValue if a layer of the curriculum has no rows, or an FFN is given twice.
    """
    lacking = [layer for layer in curriculum.layers if layer not in {one.layer for one in given}]
    if lacking:
        has = ", ".join(str(one.layer) for one in given)
        raise BadValue(f"the curriculum names layer {lacking[0]}, but rows are given only for {has}; scan for it too")
    places = [one for one in given if not curriculum.layers or one.layer in curriculum.layers]
    keys = [(one.layer, one.expert) for one in places]
    if len(set(keys)) < len(keys):
        layer, _ = next(key for key in keys if keys.count(key) > 1)
        raise BadValue(f"rows of layer {layer} are given twice; give each FFN once, with all its rows")
    return places


def _dropped_from(
    base: nn.Module, rows: RankedRows, curriculum: Curriculum, layers: Sequence[DecoderLayer] | None
) -> Dropped:
    ffn = _massive_ffn(base, rows, layers)
    for place in ffn.inputs:
        MatrixRows(base, place)  # raises if the matrix has no rows that can be changed
    chosen = chosen_rows(rows, curriculum, ffn.width(base))
    return Dropped(ffn, chosen, [masked_rows(base, place, chosen) for place in ffn.inputs])


def chosen_rows(massive: RankedRows, curriculum: Curriculum, width: int) -> list[int]:
    """The rows in the curriculum's scope. width: rows of the FFN, I.

    Raises BadValue if fewer than k rows were ranked, or some of them do not exist.
    """
    if curriculum.k > len(massive.indices):
        raise BadValue(
            f"the curriculum needs k = {curriculum.k} rows and the scan ranked {len(massive.indices)}; "
            f"scan with -k {curriculum.k}"
        )
    top = list(massive.indices[: curriculum.k])
    if not all(0 <= row < width for row in top):
        raise BadValue(f"rows {top} do not all exist: {massive.module} has rows 0 to {width - 1}; scan this model")
    if curriculum.scope == "massive":
        return top
    return [row for row in range(width) if curriculum.scope == "all" or row not in set(top)]


def _massive_ffn(base: nn.Module, massive: RankedRows, layers: Sequence[DecoderLayer] | None) -> FFN:
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
            "the model is wrapped by FSDP1 (FullyShardedDataParallel), which flattens weights; to train with MacDrop, "
            "use FSDP2 (fsdp_version: 2) or DDP"
        )
