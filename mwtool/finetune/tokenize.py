"""Examples as token ids, with the tokens that are trained on: chat templates, masks, windows, packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mwtool.errors import BadValue
from mwtool.finetune.data import Data, Example, Turn, Unreadable, complaint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not trained on, as transformers has it."""
_HEADINGS = {"system": "### System:\n", "user": "### Instruction:\n", "assistant": "### Response:\n"}
_LEAST = 2
"""Tokens of a sequence: one to condition on and one to learn."""

Sequence_ = tuple[Tensor, Tensor]  # ids and labels, (T,) int32 each


@dataclass(frozen=True, slots=True)
class Encoded:
    """Sequences ready to be batched.

    ids, labels: one tensor (T,) a sequence; label `IGNORED` where a token is not trained on.
    lengths: of the examples a sequence is packed from; one each without packing.
    too_long: examples left out because they have more tokens than fit. refused: those the chat template refuses.
    notes: what the user should know.
    """

    ids: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    lengths: tuple[tuple[int, ...], ...]
    too_long: int = 0
    refused: tuple[Unreadable, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sequence; `position_ids` begin again with each packed example."""
        places = torch.cat([torch.arange(length) for length in self.lengths[index]])
        return {"input_ids": self.ids[index], "labels": self.labels[index], "position_ids": places}

    @property
    def trained_tokens(self) -> int:
        """How many tokens are learned in one epoch."""
        return sum(int((labels != IGNORED).sum()) for labels in self.labels)

    def only(self, chosen: Sequence[int]) -> Encoded:
        """The sequences of these numbers."""
        return Encoded(
            tuple(self.ids[at] for at in chosen),
            tuple(self.labels[at] for at in chosen),
            tuple(self.lengths[at] for at in chosen),
        )


def encode(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    on_prompt: bool = False,
    packing: bool = False,
    skip_bad: bool = False,
) -> Encoded:
    """Every example as a sequence of at most `max_length` tokens.

    Plain text begins with bos, where the tokenizer has one, and is cut into windows; conversations follow the
    tokenizer's chat template, else headings of our own, and only answers are trained on unless `on_prompt`. Those
    that are too long are left out. Raises BadValue where nothing is left, or the template refuses a row and `skip_bad`
    does not leave it out.
    """
    writer = _Writer(tokenizer, max_length, on_prompt=on_prompt)
    made: list[Sequence_] = []
    for example in data.examples:
        made += writer.windows(example, closed=not data.stream) if example.text is not None else writer.talk(example)
    if writer.refused and (not skip_bad or not made):
        raise BadValue(complaint(data.name, len(data.examples), writer.refused))
    if not made:
        raise BadValue(
            f"all {writer.too_long:,} examples of {data.name} are longer than {max_length} tokens: raise --max-length"
            if writer.too_long
            else f"{data.name} has nothing to train on in {len(data.examples):,} examples"
        )
    bins = _packed([len(ids) for ids, _ in made], max_length) if packing else [[at] for at in range(len(made))]
    return Encoded(
        tuple(torch.cat([made[at][0] for at in one]) for one in bins),
        tuple(torch.cat([made[at][1] for at in one]) for one in bins),
        tuple(tuple(len(made[at][0]) for at in one) for one in bins),
        writer.too_long,
        tuple(writer.refused),
        tuple(writer.notes(data)),
    )


def split(encoded: Encoded, share: float, seed: int) -> tuple[Encoded, Encoded | None]:
    """What is trained on and what is held out, drawn with `seed`; nothing is where `share` is 0.

    Raises BadValue where there are too few sequences for both.
    """
    if share == 0:
        return encoded, None
    held = max(1, round(share * len(encoded)))
    if held >= len(encoded):
        raise BadValue(
            f"{len(encoded)} sequences are too few to hold {share:.0%} out; give more data, or --eval-share 0"
        )
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed)).tolist()
    return encoded.only(sorted(order[held:])), encoded.only(sorted(order[:held]))


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sequences as a batch, (B, T), padded on the right with what nobody sees or learns."""
    longest = max(len(row["input_ids"]) for row in rows)
    packed = any((row["position_ids"][1:] == 0).any() for row in rows)
    batch = {
        "input_ids": torch.stack([_filled(row["input_ids"], longest, 0) for row in rows]).long(),
        "labels": torch.stack([_filled(row["labels"], longest, IGNORED) for row in rows]).long(),
    }
    if packed:  # a mask would keep transformers from telling the examples apart by their positions
        batch["position_ids"] = torch.stack([_placed(row["position_ids"], longest) for row in rows])
    else:
        batch["attention_mask"] = torch.stack(
            [_filled(torch.ones(len(row["input_ids"]), dtype=torch.long), longest, 0) for row in rows]
        )
    return batch


def _labels(values: list[int]) -> Tensor:
    """The first token of an example is never learned: nothing stands before it, or another example does."""
    return torch.tensor([IGNORED, *values[1:]], dtype=torch.int32)


def _filled(values: Tensor, length: int, by: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)), value=by)


def _placed(places: Tensor, length: int) -> Tensor:
    """Padding is one more example, which only it sees."""
    return torch.cat([places, torch.arange(length - len(places))])


def _packed(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of the sequences that share a row: first fit, the longest first."""
    room: list[int] = []
    bins: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        # only the newest rows have room to speak of; looking at all would take quadratic time
        first = next((one for one in range(max(0, len(bins) - 256), len(bins)) if room[one] >= lengths[at]), None)
        if first is None:
            bins.append([])
            room.append(most)
            first = len(bins) - 1
        bins[first].append(at)
        room[first] -= lengths[at]
    return bins


class _Writer:
    """Turns examples into sequences, and counts what did not fit."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, on_prompt: bool) -> None:
        self.tokenizer: Any = tokenizer
        self.max_length, self.on_prompt = max_length, on_prompt
        self.first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.too_long = self.last_answers = 0
        self.refused: list[Unreadable] = []

    def windows(self, example: Example, *, closed: bool) -> Iterator[Sequence_]:
        """A text in windows that begin with bos; eos ends it where it is `closed`."""
        ids = self._ids(example.text or "") + (self.last if closed else [])
        step = self.max_length - len(self.first)
        for start in range(0, len(ids), step):
            window = torch.tensor([*self.first, *ids[start : start + step]], dtype=torch.int32)
            if len(window) >= _LEAST:
                yield window, _labels(window.tolist())

    def talk(self, example: Example) -> Iterator[Sequence_]:
        """A conversation, of which the answers are trained on."""
        from jinja2 import TemplateError

        try:
            parts = self._templated(example.turns) if self.tokenizer.chat_template else self._headed(example.turns)
        except TemplateError as fault:
            self.refused.append(Unreadable(f"{example.where}: the chat template refuses it ({fault})"))
            return
        ids = [token for tokens, _ in parts for token in tokens]
        labels = _labels([token if told or self.on_prompt else IGNORED for tokens, told in parts for token in tokens])
        if len(ids) > self.max_length:
            self.too_long += 1
        elif (labels != IGNORED).any():
            yield torch.tensor(ids, dtype=torch.int32), labels

    def notes(self, data: Data) -> Iterator[str]:
        if self.too_long:
            yield (
                f"{self.too_long:,} of {len(data.examples):,} examples are longer than {self.max_length} tokens and "
                f"left out (--max-length)"
            )
        if not self.tokenizer.chat_template and any(example.text is None for example in data.examples):
            shown = " ".join(f"{_HEADINGS[role].strip()} ..." for role in ("user", "assistant"))
            yield f"the tokenizer has no chat template: messages stand under headings, each on a line ({shown})"
        if self.last_answers:
            yield (
                f"the chat template writes answers differently once others follow: of {self.last_answers:,} "
                f"conversations only the last answer is trained on"
            )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _headed(self, turns: Sequence[Turn]) -> list[tuple[list[int], bool]]:
        """Without a chat template: a heading a message, eos after each answer."""
        parts = [(list(self.first), False)]
        for number, turn in enumerate(turns):
            before = ("\n\n" if number else "") + _HEADINGS[turn.role]
            if turn.role == "assistant":
                parts += [(self._ids(before), False), (self._ids(turn.content) + self.last, True)]
            else:
                parts.append((self._ids(before + turn.content), False))
        return parts

    def _templated(self, turns: Sequence[Turn]) -> list[tuple[list[int], bool]]:
        """By the chat template: an answer is what it adds to what came before."""
        whole, spans = self._render(turns), self._answers(turns)
        if self.tokenizer.is_fast:
            found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return [
                ([token], any(start <= at < end for start, end in spans))
                for token, (at, _) in zip(found["input_ids"], found["offset_mapping"], strict=True)
            ]
        borders = [0, *(border for span in spans for border in span), len(whole)]
        pieces = [whole[start:end] for start, end in pairwise(borders)]
        return [(self._ids(piece), number % 2 == 1) for number, piece in enumerate(pieces) if piece]

    def _answers(self, turns: Sequence[Turn]) -> list[tuple[int, int]]:
        """Where in the rendered conversation the answers stand."""
        from jinja2 import TemplateError

        whole = self._render(turns)
        spans = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._render(turns[:number], prompt=True) if number else ""
            after = self._render(turns[: number + 1])
            if whole.startswith(before) and whole.startswith(after):
                spans.append((len(before), len(after)))
            elif number == len(turns) - 1:
                raise TemplateError("it does not go on as its own prompt ends; --train-on-prompt needs no prompt")
        answers = sum(turn.role == "assistant" for turn in turns)
        if len(spans) < answers:
            self.last_answers += 1
            return spans[-1:]
        return spans

    def _render(self, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        said = [{"role": turn.role, "content": turn.content} for turn in turns]
        text: str = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=prompt)
        return text
