"""Which token stands at the first position: bos, and how it was found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mwtool.errors import NoBos

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from mwtool.models.gguf_model import Vocabulary

PROMPT = "Apple Inc. is a worldwide tech company."
"""Fed, without bos, under `--bos never`: the prompt of the super-weight paper (Yu et al. 2024)."""


@dataclass(frozen=True, slots=True)
class Bos:
    """The token fed at the first position.

    how: where it comes from; `none` means that it is not a bos at all but the first token of a prompt.
    note: what the user should know about the choice.
    """

    id: int
    token: str | None
    how: Literal["tokenizer", "config", "given", "none"]
    note: str | None = None


def find_bos(
    choice: str, tokenizer: PreTrainedTokenizerBase | Vocabulary | None, config: PretrainedConfig, prompt: str = PROMPT
) -> Bos:
    """The token `--bos` means.

    auto: the tokenizer's bos, else the configuration's.
    always: the tokenizer's bos and nothing else.
    never: the first token of `prompt`, encoded without special tokens.
    anything else: that token, or that id.

    Raises NoBos if there is none, or it is outside the vocabulary.
    """
    text = config.get_text_config()
    bos = _choose(choice, tokenizer, text, prompt)
    if not 0 <= bos.id < text.vocab_size:
        raise NoBos(f"token id {bos.id} ({bos.how}) is outside the vocabulary of {text.vocab_size}; give another --bos")
    return bos


def _choose(
    choice: str, tokenizer: PreTrainedTokenizerBase | Vocabulary | None, config: PretrainedConfig, prompt: str
) -> Bos:
    if choice == "never":
        return _first_of(prompt, tokenizer)
    if choice not in ("auto", "always"):
        return _given(choice, tokenizer)
    if tokenizer is not None and tokenizer.bos_token_id is not None:
        return _told(Bos(tokenizer.bos_token_id, str(tokenizer.bos_token), "tokenizer"), tokenizer.eos_token_id)
    if choice == "auto" and isinstance(config.bos_token_id, int):
        token = None if tokenizer is None else _token(tokenizer, config.bos_token_id)
        return _told(Bos(config.bos_token_id, token, "config"), config.eos_token_id)
    where = "the tokenizer" if choice == "always" else "neither the tokenizer nor the configuration"
    names = "names no bos" if choice == "always" else "names a bos"
    raise NoBos(f"{where} {names}; say which token goes first with --bos TOKEN (a token or an id)")


def _told(bos: Bos, eos: int | list[int] | None) -> Bos:
    if bos.id not in (eos if isinstance(eos, list) else [eos]):
        return bos
    return Bos(bos.id, bos.token, bos.how, f"the bos of this model is also its eos ({bos.token or bos.id})")


def _given(choice: str, tokenizer: PreTrainedTokenizerBase | Vocabulary | None) -> Bos:
    if re.fullmatch(r"-?\d{1,18}", choice):  # a negative one is told to be outside the vocabulary
        return Bos(int(choice), None if tokenizer is None else _token(tokenizer, int(choice)), "given")
    if tokenizer is None:
        raise NoBos(f"--bos {choice!r}: there is no tokenizer to look it up in; give an id")
    if choice not in tokenizer.get_vocab():
        raise NoBos(f"--bos {choice!r}: the tokenizer has no such token; give a token of its vocabulary, or an id")
    return Bos(tokenizer.get_vocab()[choice], choice, "given")


def _first_of(prompt: str, tokenizer: PreTrainedTokenizerBase | Vocabulary | None) -> Bos:
    if tokenizer is None:
        raise NoBos("--bos never needs a tokenizer for the prompt, and there is none; give a token id instead")
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if not ids:
        raise NoBos(f"--bos never: the prompt {prompt!r} has no tokens")
    return Bos(ids[0], _token(tokenizer, ids[0]), "none", f"no bos: the first token of {prompt!r} was fed instead")


def _token(tokenizer: PreTrainedTokenizerBase | Vocabulary, token_id: int) -> str | None:
    token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
    return token if isinstance(token, str) else None
