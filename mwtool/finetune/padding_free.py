"""Micro-batches without padding: sequences behind each other in one row, none of which sees another.

Position ids begin again with each sequence. transformers turns them into a mask of N x N for a row of N tokens, which
costs more than padding once N is large. torch has a kernel for such rows, which reads where each sequence begins and
computes nothing between them; it needs a GPU and 16-bit precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mwtool.architecture.validate import unwrapped
from mwtool.errors import UnsupportedModel
from mwtool.finetune.sequences import collate

if TYPE_CHECKING:
    from mwtool.finetune.config import Recipe

VARLEN = "mwtool_varlen"
"""The kernel's name among transformers' attention implementations."""
LEAK, ROUNDING = 1e-3, {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Shares of the largest logit: what an example may change in the one behind it, where all shapes are the same, and by
how much an example in a row may differ from itself alone, where kernels of other shapes round otherwise."""
_LENGTHS = (8, 8, 5, 11)


def flattened(examples: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Sequences as one row, (1, N), with where each begins. Those that are packed already are taken apart."""
    parts = [part for one in examples for part in _apart(one)]
    row: dict[str, Any] = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(parts)
    return row


def _apart(one: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    starts = [*(one["position_ids"] == 0).nonzero()[:, 0].tolist(), len(one["position_ids"])]
    for start, end in pairwise(starts):
        yield {name: one[name][start:end] for name in ("input_ids", "labels")}


def chosen(model: Any, recipe: Recipe) -> Any:
    """How micro-batches are made: `collate`, with padding, or `flattened`.

    Raises UnsupportedModel if the recipe wants the latter and sequences see each other then.
    """
    if recipe.padding_free is None and (recipe.wants_batches or not _has_kernel(model, recipe.dtype)):
        return collate
    if recipe.padding_free is False:
        return collate
    with rows(model, recipe.dtype):
        apart = sees_itself_alone(model, recipe.dtype)
    if apart:
        return flattened
    if recipe.padding_free:
        kind = unwrapped(model).config.model_type
        raise UnsupportedModel(f"{kind} lets examples in a row see each other; leave out --padding-free")
    return collate


@contextmanager
def rows(model: Any, dtype: str) -> Iterator[None]:
    """Inside the block, attention within rows is computed by torch's kernel where that can be."""
    with _attention_by(VARLEN if _has_kernel(model, dtype) else None, unwrapped(model)):
        yield


@contextmanager
def padded(model: Any) -> Iterator[None]:
    """Inside the block, inside one of `rows`, batches have padding: their masks are those of `sdpa`."""
    inner: Any = unwrapped(model)
    with _attention_by("sdpa" if inner.config._attn_implementation == VARLEN else None, inner):  # noqa: SLF001 # as below
        yield


@contextmanager
def _attention_by(name: str | None, inner: Any) -> Iterator[None]:
    before = inner.config._attn_implementation  # noqa: SLF001 # transformers has no public name for it
    if name is None:
        yield
        return
    inner.set_attn_implementation(name)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def _has_kernel(model: Any, dtype: str) -> bool:
    """Whether the kernel computes what this model's attention is: causal, over all positions, nothing added."""
    inner: Any = unwrapped(model)
    config = inner.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        model.get_input_embeddings().weight.device.type == "cuda"
        and dtype in ("bfloat16", "float16")
        and _kernel() is not None
        and inner.config._attn_implementation == "sdpa"  # noqa: SLF001 # as above
        and not windowed
        and kinds == {"full_attention"}
        and not getattr(config, "attn_logit_softcapping", None)
    )


def _kernel() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _attention(  # transformers' interface
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface; a batch without `cu_seq_lens_q` is computed as `sdpa` does.

    query: (1, heads, N, D). cu_seq_lens_q: (sequences + 1,), where each begins. Returns (1, N, heads, D).
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    kernel, groups = _kernel(), query.shape[1] // key.shape[1]
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel).parameters else {}
    if groups > 1 and not grouped:
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    given = [one[0].transpose(0, 1) for one in (query, key, value)]  # (N, heads, D)
    longest = int(max_length_q or query.shape[2])
    out: Tensor = kernel(
        *given,
        *(cu_seq_lens_q, cu_seq_lens_q),
        *(longest, longest),
        scale=options.get("scaling"),
        window_size=(-1, 0),  # causal
        **grouped,
    )
    return out[None], None


def _mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """None for rows, whose sequences the kernel keeps apart, and for a batch without padding, which is causal."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **options)


AttentionInterface.register(VARLEN, _attention)
AttentionMaskInterface.register(VARLEN, _mask)


def sees_itself_alone(model: Any, dtype: str) -> bool:
    """Whether an example in a row gives the logits that it gives alone, whatever stands before it.

    Compares a row of four examples with each alone, and with the same row after another first example.
    """
    device = model.get_input_embeddings().weight.device
    size = min(unwrapped(model).config.get_text_config().vocab_size, 97)
    parts = [(torch.arange(length) * (at + 3) + at + 1) % size for at, length in enumerate(_LENGTHS)]
    other = [parts[0].flip(0), *parts[1:]]
    training = model.training
    model.eval()
    precision = getattr(torch, dtype)
    lower = torch.autocast(device.type, precision) if precision != torch.float32 else nullcontext()
    try:
        with torch.no_grad(), lower:
            one, another = (_in_a_row(model, given, device) for given in (parts, other))
            alone = [model(input_ids=part[None].to(device), use_cache=False).logits[0].float() for part in parts]
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError):  # transformers refuses rows for this type, or the kernel its shapes
        return False
    finally:
        model.train(training)
    largest, first = float(torch.cat(alone).abs().max()), _LENGTHS[0]
    leak = float((one[first:] - another[first:]).abs().max())
    apart = float((one - torch.cat(alone)).abs().max())
    return leak <= LEAK * largest and apart <= ROUNDING[precision] * largest


def _in_a_row(model: Any, parts: Sequence[Tensor], device: torch.device) -> Tensor:
    row = flattened([{"input_ids": p, "labels": p, "position_ids": torch.arange(len(p))} for p in parts])
    del row["labels"]
    given = {name: value.to(device) if torch.is_tensor(value) else value for name, value in row.items()}
    logits: Tensor = model(**given, use_cache=False).logits[0].float()
    return logits
