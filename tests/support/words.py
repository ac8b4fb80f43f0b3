"""Tiny models whose tokenizer knows 40 words, with a text of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mwtool.models.load import Loaded, load

WORDS = [f"w{number}" for number in range(40)]
LAYERS = 4
"""Of a planted model: one layer before the row, and one between it and the last."""


def with_tokenizer(folder: Path, model: PreTrainedModel) -> Path:
    """The model saved with a tokenizer of 40 words, and a text of them."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    order = torch.randint(40, (95,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(WORDS[index] for index in order))
    return tiny.saved(folder, model)


def adding_bos(tokenizer: Any) -> Any:
    """The same, putting bos in front of everything by itself, as Llama's does."""
    raw = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tiny.BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def planted_folder(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """Such a model with a massive row, saved."""
    model = tiny.model(model_type, **{"num_hidden_layers": LAYERS, **changes})
    tiny.plant(model)
    return with_tokenizer(folder, model)


def opened(folder: Path) -> Loaded:
    """Loaded with this tokenizer; AutoTokenizer takes some types' own class, whatever the folder says."""
    return replace(load(str(folder)), tokenizer=PreTrainedTokenizerFast.from_pretrained(folder))


def planted(folder: Path, model_type: str = "llama", **changes: Any) -> Loaded:
    return opened(planted_folder(folder, model_type, **changes))


def text_of(loaded: Loaded) -> str:
    """The task of its text."""
    return f"ppl:{loaded.source.folder / 'text.txt'}"


def perplexity_of(loaded: Loaded) -> float:
    """By plain transformers code in float64: windows of bos and 15 tokens, one by one."""
    tokenizer: Any = loaded.tokenizer
    ids = tokenizer((loaded.source.folder / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
    total = count = 0.0
    for start in range(0, len(ids), 15):
        window = torch.tensor([[tiny.BOS, *ids[start : start + 15]]])
        with torch.no_grad():
            logits = loaded.model(input_ids=window).logits[0].double().log_softmax(-1)
        total -= float(logits[:-1].gather(1, window[0, 1:, None]).sum())
        count += window.shape[1] - 1
    return math.exp(total / count)
