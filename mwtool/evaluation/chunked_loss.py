"""The loss of each token without the logits of all tokens: the output head is applied to a few positions at a time.

The last hidden states are heard in a forward of the model itself. What follows them (the head
with its bias, soft-capping, logit scales) is the model's own code too: its forward is run with
the body's answer replaced by a chunk of them. Whether that gives the model's own logits is tried
on a few tokens; where it does not, the model runs whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mwtool.architecture.validate import unwrapped

MULTIPLE, LEAST, TILE = 8, 2**22, 128
"""Float32 logits of a chunk take at most 8 times the bytes of the hidden states, or 4 MB where that is more; a GPU's
matrix products work on tiles of 128 rows, and a tile begun costs as much as a full one."""
TRIED = 16
"""Tokens on which the two ways are compared."""


@dataclass(frozen=True, slots=True)
class Head:
    """A causal language model, and how its logits come about.

    model: what to call. inner, body: the model without PEFT's wrapper, and its part that ends with the last hidden
    state; body is None where logits cannot be had from it, for the reason in `why`.
    """

    model: nn.Module
    inner: nn.Module
    body: nn.Module | None
    why: str | None = None

    def losses(self, ids: Tensor, scored: Tensor, most: int, device: torch.device) -> Tensor:
        """-ln p of the scored tokens, in the order of `ids`, (N,), float32 (float64 from float64 logits).

        ids: (B, T), padded on the right, which a causal model does not see. scored: (B, T), bool; never column 0.
        Both on the CPU: where to look is found there, and nothing waits for the device.
        most: tokens read, T or T - 1. All are read where they may be: an odd number is slow on some devices.
        """
        targets = sent(ids[scored], device)  # (N,)
        before = functional.pad(scored[:, 1:], (0, 1))  # position t gives the logits of token t + 1
        if ids.shape[1] > most:  # the last token needs no position of its own
            ids, before = ids[:, :most], before[:, :most]
        places, read = before.flatten().nonzero()[:, 0], sent(ids, device)  # (N,), (B, T)
        if self.body is None:
            logits = self.model(input_ids=read, use_cache=False).logits.flatten(0, 1)  # (B * T, V)
            return _loss(logits[sent(places, logits.device)], targets)
        with _heard(self.body, 1) as answers:
            self.model(input_ids=read, use_cache=False)
        answer = answers[0]
        hidden = answer[0].flatten(0, 1)[sent(places, answer[0].device)]  # (N, H)
        rows = rows_at_once(answer[0], self.vocabulary)
        parts = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        return torch.cat([_loss(self._logits(answer, chunk, read), aims) for chunk, aims in parts])

    @property
    def vocabulary(self) -> int:
        """Entries of one position's logits, V."""
        config: Any = self.inner.config
        return int(config.get_text_config().vocab_size)

    def _logits(self, answer: Any, hidden: Tensor, ids: Tensor) -> Tensor:
        """What the model's own forward makes of these hidden states, (N, H) -> (N, V)."""
        assert self.body is not None
        with _answering(self.body, type(answer)(last_hidden_state=hidden[None])):
            logits: Tensor = self.inner(input_ids=ids[:1, :1].expand(1, len(hidden)), use_cache=False).logits[0]
        return logits


def head_of(model: Any, ids: Tensor) -> Head:
    """How to get the losses of this model: in chunks where that gives the logits its forward gives, else whole.

    ids: (1, T), of which the first few are tried.
    """
    inner = unwrapped(model)
    body = getattr(inner, "base_model", inner)
    if body is inner:
        return Head(model, inner, None, f"{type(inner).__name__} has no body apart from its head")
    head, few = Head(model, inner, body), ids[:, :TRIED]
    with _heard(body) as answers:
        whole = model(input_ids=few, use_cache=False).logits[0].float()  # (T, V)
    answer: Any = answers[0] if len(answers) == 1 else None
    fitting = hasattr(answer, "last_hidden_state") and answer[0].shape[:2] == few.shape
    if fitting and _same(head._logits(answer, answer[0][0], few).float(), whole):  # noqa: SLF001 # our own class
        return head
    return Head(model, inner, None, f"the logits of {type(inner).__name__} do not follow from its last hidden state")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on a device. A GPU copies from pinned memory when it comes to it, from other memory before all else."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def rows_at_once(hidden: Tensor, vocabulary: int) -> int:
    """Positions whose float32 logits, V wide, are held at once."""
    budget = max(MULTIPLE * hidden.numel() * hidden.element_size(), LEAST)
    rows = max(1, budget // (4 * vocabulary))
    if hidden.device.type == "cpu":  # what outgrows the caches costs several times as much
        rows = min(rows, max(TILE, LEAST // (4 * vocabulary)))
    return rows if rows < TILE else rows // TILE * TILE


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    likely = functional.log_softmax(logits, dim=-1, dtype=exact)  # (N, V)
    return -likely.gather(1, targets.to(likely.device)[:, None])[:, 0]


def _same(ours: Tensor, whole: Tensor) -> bool:
    """Within a thousandth of the largest logit; non-finite ones at the same places."""
    finite = whole[whole.isfinite()]
    tolerance = 1e-3 * finite.abs().max().item() if finite.numel() else 0.0
    return ours.shape == whole.shape and torch.allclose(ours, whole, rtol=0, atol=tolerance, equal_nan=True)


@contextmanager
def _heard(body: nn.Module, positions: int | None = None) -> Iterator[list[Any]]:
    """What the body answers in the block; what comes after it sees no more than so many positions."""
    answers: list[Any] = []

    def hear(_module: nn.Module, _args: Any, answer: Any) -> Any:
        answers.append(answer)
        return answer if positions is None else type(answer)(last_hidden_state=answer[0][:, :positions])

    handle = body.register_forward_hook(hear)
    try:
        yield answers
    finally:
        handle.remove()


@contextmanager
def _answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """The module gives this answer, whatever it is called with; what accelerate put in its place returns after."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *_args, **_options: answer
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
