"""A PEFT adapter on its base model, and the tokenizer that comes with it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadCheckpoint, UnsupportedModel, line_of
from mwtool.files.text import read_json
from mwtool.models.load_options import On
from mwtool.models.offloaded_adapter import is_offloaded, refuse_unplaced, with_adapter_over
from mwtool.models.source import ADAPTER_CONFIG, ADAPTER_FILES, Source, unusable

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def with_adapter(base: PreTrainedModel, adapter: str, on: On) -> tuple[Any, PreTrainedModel]:
    """What to call, and the module that holds the weights attacked: the base model below the adapter, or the sum.

    adapter: its folder. on: where attacks act; where it is `merged`, the adapter is added to the weights.
    Raises BadCheckpoint for one that cannot be applied, UnsupportedModel for virtual tokens, and what
    `refuse_unplaced` raises where layers of the base model are offloaded.
    """
    if not is_offloaded(base):
        wrapped: Any = applied(base, adapter)
        if on == "merged":
            merged = wrapped.merge_and_unload().eval()
            return merged, merged
    else:
        how = "put on a base model that is offloaded in part"
        wrapped = with_adapter_over(base, partial(applied, adapter=adapter, alone=how), merged=on == "merged")
    return wrapped, wrapped.get_base_model()


def applied(base: PreTrainedModel, adapter: str, alone: str | None = None) -> PeftModel:
    """The base model wrapped by PEFT with the adapter of a folder.

    alone: what is to be done with an adapter that may hold no weights of the base model, in words.
    Raises BadCheckpoint, and UnsupportedModel.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    if not any((Path(adapter) / file).exists() for file in ADAPTER_FILES):
        raise BadCheckpoint(f"the adapter {adapter} has no weights; expected {' or '.join(ADAPTER_FILES)}")
    read_json(Path(adapter) / ADAPTER_CONFIG)
    faults: tuple[type[Exception], ...] = (*unusable(), UnpicklingError, EOFError, SafetensorError)
    try:
        config = PeftConfig.from_pretrained(adapter)
        if config.is_prompt_learning:
            raise UnsupportedModel(
                f"the adapter {adapter} is {config.peft_type.value}, which puts virtual tokens where bos should be "
                f"first; expected an adapter of weights, such as LoRA"
            )
        if alone is not None:
            refuse_unplaced(adapter, config, alone)
        with warnings.catch_warnings():  # peft asks transformers by a former name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return PeftModel.from_pretrained(base, adapter).eval()
    except faults as fault:
        raise BadCheckpoint(f"the adapter {adapter} cannot be applied: {line_of(fault)}") from fault


def tokenizer_beside(
    source: Source, tokenizer: PreTrainedTokenizerBase | None, base: PreTrainedModel
) -> tuple[PreTrainedTokenizerBase | None, tuple[str, ...]]:
    """The tokenizer of an adapter that brings its own, else that of its base model; a note where the two differ."""
    assert source.adapter is not None
    own = replace(source, folder=Path(source.adapter), repo=None).tokenizer()
    if own is None:
        return tokenizer, ()
    if tokenizer is not None and _same(own, tokenizer):
        return own, ()
    most = max(own.get_vocab().values(), default=0)
    embedding: Any = base.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if most >= rows:
        return tokenizer, (
            (
                f"the adapter {source.adapter} brings a tokenizer with token ids up to {most}, and the base model has "
                f"{rows} embeddings; the base model's tokenizer is used"
            ),
        )
    return own, (f"the adapter {source.adapter} brings a tokenizer that differs from its base model's; it is used",)


def _same(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same tokens, special tokens and chat template."""
    return (
        one.get_vocab() == other.get_vocab()
        and one.special_tokens_map == other.special_tokens_map
        and one.chat_template == other.chat_template
    )
