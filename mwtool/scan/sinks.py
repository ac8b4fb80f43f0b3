"""Attention sinks: how often each head pays much attention to the first token, by the metric of Gu et al. (2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mwtool.errors import UnsupportedModel
from mwtool.scan.given import bundled_or_file
from mwtool.scan.sequences import Taps, run
from mwtool.scan.texts import batches, windows_of

if TYPE_CHECKING:
    from mwtool.scan.settings import Settings
    from mwtool.scan.subject import Subject


@dataclass(frozen=True, slots=True)
class HeadSinks:
    """One layer. rates: of each head, the part of windows in which it is a sink. scores: its mean importance score."""

    layer: int
    rates: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def rate(self) -> float:
        """The mean over its heads."""
        return sum(self.rates) / len(self.rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinks:
    """Sink rates of a model.

    text: name of the text. windows, length: what was read. eps: the threshold.
    layers: those that have attention weights, first layer first.
    """

    text: str
    windows: int
    length: int
    eps: float
    layers: tuple[HeadSinks, ...]
    notes: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """Of the model: the mean over layers of the mean over heads."""
        return sum(one.rate for one in self.layers) / len(self.layers)


def importance(attention: Tensor) -> Tensor:
    """How much attention each position receives: the mean over the queries that can see it.

    With attention weights A and T positions counted from 1, alpha_k = 1/(T - k + 1) x sum over i = k..T of A[i, k]
    (Gu et al. 2024, "When Attention Sink Emerges in Language Models", arXiv 2410.10781).

    attention: (B, heads, T, T), query before key. Returns (B, heads, T) in float64.
    """
    seen_by = torch.arange(attention.shape[-1], 0, -1, dtype=torch.float64, device=attention.device)
    return attention.to(torch.float64).sum(-2) / seen_by


def sink_rates(subject: Subject, settings: Settings) -> Sinks:
    """The sink rate of each layer and head on the text that the settings name.

    A head is a sink in a window of T tokens if alpha_1 > eps there, alpha_1 being the mean attention that its queries
    pay to the first token (`importance`); its rate is the part of windows in which it is one, a layer's the mean over
    heads, the model's the mean over layers: Sink_1 of Gu et al. with their eps 0.3 and T 64, the mean over windows.
    A running sum for each head is all that is kept. Raises UnsupportedModel for a model without attention weights.
    """
    texts = settings.texts
    assert texts.sinks is not None
    windows, notes = windows_of(subject, bundled_or_file(texts.sinks), texts.sink_length, texts.sink_windows)
    sums: dict[int, Tensor] = {}  # layer -> (2, heads): windows in which it is a sink, and scores

    def add(layer: int, attention: Tensor) -> None:
        first = importance(attention)[..., 0].cpu()  # (B, heads)
        found = torch.stack([(first > texts.eps).double().sum(0), first.sum(0)])
        sums[layer] = sums[layer] + found if layer in sums else found

    for ids in batches(windows):
        run(subject, ids, Taps(attention=add, last=settings.last_layer))
    if not sums:
        raise UnsupportedModel(
            f"{type(subject.model).__name__} hands out no attention weights of its layers; --sinks and --attention "
            f"need a model of attention that transformers can compute eagerly"
        )
    layers = (HeadSinks(layer, *map(tuple, (sums[layer] / len(windows)).tolist())) for layer in sorted(sums))
    return Sinks(
        text=texts.sinks,
        windows=windows.shape[0],
        length=windows.shape[1],
        eps=texts.eps,
        layers=tuple(layers),
        notes=notes,
    )
