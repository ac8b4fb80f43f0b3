"""The loss of each token without holding all logits: the output head is applied to a few positions at a time.

The last hidden states are captured with a hook in a forward of the model. What follows them (the
head with its bias, soft-capping, logit scales) is also the model's own code: its forward is run
with the output of the body replaced by a chunk of the hidden states. Whether this gives the same
logits is tested on a few tokens; if not, the whole model is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mwtool.architecture.validate import unwrapped
from mwtool.interrupts import restored

MULTIPLE, LEAST, TILE = 8, 2**22, 128
"""The float32 logits of a chunk take at most 8 times the bytes of the hidden states, or 4 MB if that is more. Matrix
products on a GPU work on tiles of 128 positions, and a partial tile costs as much as a full one."""
TESTED = 16
"""Number of tokens on which chunked and whole logits are compared."""


Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A causal language model and the way its logits are computed.

    model: the model to call. inner: the model without PEFT's wrapper. body: the part of it that outputs the last
    hidden state; None if the logits cannot be computed from that, for the reason in `why`. loss: as `loss_of`.
    """

    model: nn.Module
    inner: nn.Module
    body: nn.Module | None
    why: str | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def losses(self, ids: Tensor, scored: Tensor, most: int, device: torch.device) -> Tensor:
        """-ln p of the N scored tokens in the order of `ids`, (N,), float32 (float64 for float64 logits).

        ids: (B, T), padded on the right, where padding does not affect a causal model. scored: (B, T) of bool, never
        column 0. Both are on the CPU, so that finding the scored positions does not wait for the device.
        most: positions of the model; if T is larger by one, the last token is only scored and not an input.
        """
        return torch.cat(list(self._each(ids, scored, most, device, self.loss or loss_of)))

    def answers(self, ids: Tensor, scored: Tensor, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """As `losses`, and of each scored token whether it is the likeliest one, (N,) of bool."""
        each = list(self._each(ids, scored, most, device, _loss_and_greedy))
        return torch.cat([loss for loss, _ in each]), torch.cat([greedy for _, greedy in each])

    def _each(
        self,
        ids: Tensor,
        scored: Tensor,
        most: int,
        device: torch.device,
        of: Callable[[Tensor, Tensor], Result],
    ) -> Iterator[Result]:
        """`of` the logits of some scored tokens, (n, V), and these tokens, (n,), one chunk after the other."""
        targets = to_device(ids[scored], device)  # (N,)
        before = functional.pad(scored[:, 1:], (0, 1))  # position t has the logits of token t + 1
        if ids.shape[1] > most:  # the last token is not an input
            ids, before = ids[:, :most], before[:, :most]
        places, read = before.flatten().nonzero()[:, 0], to_device(ids, device)  # (N,), (B, T)
        if self.body is None:
            logits = self.model(input_ids=read, use_cache=False).logits.flatten(0, 1)  # (B * T, V)
            yield of(logits[to_device(places, logits.device)], targets)
            return
        with _captured(self.body, 1) as outputs:
            self.model(input_ids=read, use_cache=False)
        output = outputs[0]
        hidden = output[0].flatten(0, 1)[to_device(places, output[0].device)]  # (N, H)
        size = positions_per_chunk(output[0], self.vocabulary)
        for chunk, aims in zip(torch.split(hidden, size), torch.split(targets, size), strict=True):
            yield of(self._logits(output, chunk, read), aims)

    @property
    def vocabulary(self) -> int:
        """V, the number of logits at each position."""
        config: Any = self.inner.config
        return int(config.get_text_config().vocab_size)

    def _logits(self, output: Any, hidden: Tensor, ids: Tensor) -> Tensor:
        """The model's logits for these hidden states, (N, H) -> (N, V)."""
        assert self.body is not None
        with _returning(self.body, type(output)(last_hidden_state=hidden[None])):
            logits: Tensor = self.inner(input_ids=ids[:1, :1].expand(1, len(hidden)), use_cache=False).logits[0]
        return logits


def head_of(model: Any, ids: Tensor) -> Head:
    """Decide how to compute this model's losses: in chunks if they give the same logits as its forward, else whole.

    ids: (1, T), of which the first few tokens are tested.
    """
    inner = unwrapped(model)
    body = getattr(inner, "base_model", inner)
    if body is inner:
        return _whole(model, inner, f"{type(inner).__name__} has no body separate from its head")
    head, few = Head(model=model, inner=inner, body=body), ids[:, :TESTED]
    with _captured(body) as outputs:
        whole = model(input_ids=few, use_cache=False).logits[0].float()  # (T, V)
    output: Any = outputs[0] if len(outputs) == 1 else None
    fitting = hasattr(output, "last_hidden_state") and output[0].shape[:2] == few.shape
    if fitting and _same(head._logits(output, output[0][0], few).float(), whole):  # noqa: SLF001 # our own class
        return head
    return _whole(model, inner, f"the logits of {type(inner).__name__} depend on more than its last hidden state")


def _whole(model: nn.Module, inner: nn.Module, why: str) -> Head:
    return Head(model=model, inner=inner, body=None, why=why)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor, (...), on `device`. Copies to a GPU are asynchronous, from pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def positions_per_chunk(hidden: Tensor, vocabulary: int) -> int:
    """How many positions, with V float32 logits each, are computed at once. hidden: (B, T, H)."""
    budget = max(MULTIPLE * hidden.numel() * hidden.element_size(), LEAST)
    rows = max(1, budget // (4 * vocabulary))
    if hidden.device.type == "cpu":  # beyond the CPU caches a position costs several times as much
        rows = min(rows, max(TILE, LEAST // (4 * vocabulary)))
    return rows if rows < TILE else rows // TILE * TILE


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p of the targets, (N,), in float32 or more. logits: (N, V). targets: token ids, (N,)."""
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    likely = functional.log_softmax(logits, dim=-1, dtype=exact)  # (N, V)
    return -likely.gather(1, targets.to(likely.device)[:, None])[:, 0]


def _loss_and_greedy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return loss_of(logits, targets), logits.argmax(-1) == targets.to(logits.device)


def _same(ours: Tensor, whole: Tensor) -> bool:
    """Whether both agree within a thousandth of the largest logit, with non-finite values at the same places."""
    finite = whole[whole.isfinite()]
    tolerance = 1e-3 * finite.abs().max().item() if finite.numel() else 0.0
    return ours.shape == whole.shape and torch.allclose(ours, whole, rtol=0, atol=tolerance, equal_nan=True)


@restored
def _captured(body: nn.Module, positions: int | None = None) -> Iterator[list[Any]]:
    """Capture the outputs of the body inside the block, and pass on only the first `positions` of them."""
    outputs: list[Any] = []

    def capture(_module: nn.Module, _args: Any, output: Any) -> Any:
        outputs.append(output)
        return output if positions is None else type(output)(last_hidden_state=output[0][:, :positions])

    handle = body.register_forward_hook(capture)
    try:
        yield outputs
    finally:
        handle.remove()


@restored
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Make the module return `output` for any input; a forward that accelerate has set is restored afterwards."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *_args, **_options: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
