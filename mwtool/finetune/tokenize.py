"""Examples as token ids, with the tokens that are trained on: windows of text, and conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mwtool.errors import BadValue
from mwtool.finetune.conversation import Conversations, Span, common
from mwtool.finetune.data import Data, complaint
from mwtool.finetune.records import Example, Unreadable
from mwtool.finetune.sequences import IGNORED, REASONS, Encoded, LeftOut, packed
from mwtool.finetune.template import ADVICE, NotRendered, find_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEADINGS = {
    "system": "### System:\n",
    "developer": "### System:\n",
    "user": "### Instruction:\n",
    "assistant": "### Response:\n",
    "tool": "### Tool:\n",
}
_LEAST = 2
"""Tokens of a sequence: one to condition on and one to learn."""

Sequence_ = tuple[Tensor, Tensor]  # ids and labels, (T,) int32 each


def encode(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    on_prompt: bool = False,
    packing: bool = False,
    skip_bad: bool = False,
    chat_template: str | None = None,
    date: datetime | None = None,
) -> Encoded:
    """Every example as a sequence of at most `max_length` tokens.

    Plain text begins with bos, if the tokenizer has one, and is cut into windows. Conversations are written by the
    chat template, or under headings if there is none, and only answers are trained on unless `on_prompt`. Those longer
    than `max_length` are left out.

    chat_template: name or file of the template; None: the tokenizer's. date: what it takes for today. skip_bad: leave
    out records that the template does not write. Raises BadValue if it does not write one without `skip_bad`, if it
    cannot be used at all, and if nothing is left to train on.
    """
    talks = any(example.text is None for example in data.examples)
    template = find_template(tokenizer, chat_template, date) if talks else None
    with ExitStack() as stack:
        conversations = None
        if template is not None:
            conversations = stack.enter_context(Conversations(template, on_prompt=on_prompt))
        writer = _Writer(tokenizer, max_length, conversations, on_prompt=on_prompt)
        made = [one for example in data.examples for one in writer.sequences(example, closed=not data.stream)]
    if writer.refused and (not skip_bad or not made):
        raise BadValue(complaint(data.name, len(data.examples), writer.refused, ADVICE))
    if not made:
        raise BadValue(_nothing(data, writer.left_out, max_length))
    bins = packed([len(ids) for ids, _ in made], max_length) if packing else [[at] for at in range(len(made))]
    return Encoded(
        ids=tuple(torch.cat([made[at][0] for at in one]) for one in bins),
        labels=tuple(torch.cat([made[at][1] for at in one]) for one in bins),
        lengths=tuple(tuple(len(made[at][0]) for at in one) for one in bins),
        left_out=tuple(writer.left_out),
        refused=tuple(writer.refused),
        cut=len(writer.cut),
        notes=tuple(writer.notes(data)),
        date=template.now if template is not None and template.writes_date else None,
    )


def _nothing(data: Data, left_out: Sequence[LeftOut], max_length: int) -> str:
    """Why there is nothing to train on, and what to do."""
    reasons = {one.reason for one in left_out}
    if reasons == {"too_long"}:
        return f"all {len(left_out):,} examples of {data.name} are longer than {max_length} tokens: raise --max-length"
    shown = [
        f"{sum(o.reason == one for o in left_out):,} are {REASONS[one].format(max_length)}" for one in sorted(reasons)
    ]
    return f"{data.name} has nothing to train on in {len(data.examples):,} examples: {'; '.join(shown) or 'no token'}"


def named(records: Sequence[str]) -> str:
    """The first three records of a list, and how many there are besides."""
    more = f" and {len(records) - 3:,} more" if len(records) > 3 else ""  # noqa: PLR2004 # as many as fit on a line
    return "; ".join(records[:3]) + more


class _Writer:
    """Turns examples into sequences, and keeps which ones it cannot."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        conversations: Conversations | None,
        *,
        on_prompt: bool,
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.max_length, self.conversations, self.on_prompt = max_length, conversations, on_prompt
        self.first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.left_out: list[LeftOut] = []
        self.refused: list[Unreadable] = []
        self.cut: list[str] = []
        self.only_last: list[str] = []
        self.unended: list[str] = []
        self.unweighted: list[str] = []

    def sequences(self, example: Example, *, closed: bool) -> list[Sequence_]:
        """The sequences of an example; none, and a word on it in `left_out` or `refused`, if it has none."""
        if example.text is not None:
            made = list(self._windows(example.text, closed=closed))
            if not made:
                self.left_out.append(LeftOut(example.where, "too_short"))
            return made
        tokens = self._tokens(example)
        if tokens is None:
            return []
        if example.cut:
            self.cut.append(example.where)
        ids, trained = tokens
        labels = _labels([token if learned else IGNORED for token, learned in zip(ids, trained, strict=True)])
        if len(ids) > self.max_length:
            self.left_out.append(LeftOut(example.where, "too_long"))
        elif not (labels != IGNORED).any():
            weighted = self.on_prompt or any(turn.trained for turn in example.turns if turn.role == "assistant")
            self.left_out.append(LeftOut(example.where, "too_short" if weighted else "untrained"))
        else:
            return [(torch.tensor(ids, dtype=torch.int32), labels)]
        return []

    def notes(self, data: Data) -> Iterator[str]:
        """What is left out and why, and what the template does that the user may not expect; a sentence each."""
        count = f"of {len(data.examples):,} examples are"
        for reason, words in REASONS.items():
            found = [one.where for one in self.left_out if one.reason == reason]
            if found:
                yield f"{len(found):,} {count} {words.format(self.max_length)} and left out: {named(found)}"
        if self.cut:
            yield f"{len(self.cut):,} {count} cut off after their last answer: {named(self.cut)}"
        if self.conversations is None and any(example.text is None for example in data.examples):
            shown = " ".join(f"{_HEADINGS[role].strip()} ..." for role in ("user", "assistant"))
            yield f"the tokenizer has no chat template: messages stand under headings, each on a line ({shown})"
        if self.only_last:
            yield (
                f"the chat template writes answers differently once others follow: of {len(self.only_last):,} "
                f"conversations only the last answer is trained on: {named(self.only_last)}"
            )
        if self.unended:
            yield (
                f"nothing ends an answer in {len(self.unended):,} examples, so that the model does not learn where to "
                f"stop: the {'tokenizer has no eos' if self.conversations is None else 'chat template writes no end'}"
            )
        yield from self._unused(data)

    def _unused(self, data: Data) -> Iterator[str]:
        """What records carry that nothing reads."""
        keys: dict[str, int] = {}
        for example in data.examples:
            for key in example.unused:
                keys[key] = keys.get(key, 0) + 1
        if keys:
            yield f"keys of records that are not used: {_counted(keys)}"
        if self.conversations is None:
            unread: dict[str, int] = {}
            for example in data.examples:
                for key in {key for turn in example.turns for key in turn.more} | (
                    {"tools"} if example.tools else set()
                ):
                    unread[key] = unread.get(key, 0) + 1
        else:
            unread = dict(self.conversations.unused)
        if unread:
            yield f"not used, since the chat template does not write it: {_counted(unread)}"
        if self.conversations is not None and self.conversations.as_system:
            yield (
                f"the chat template has no developer role: in {self.conversations.as_system:,} records it is written "
                f"as the system's"
            )
        if self.unweighted:
            yield f"weight 0 has no effect with --train-on-prompt: {named(self.unweighted)}"

    def _windows(self, text: str, *, closed: bool) -> Iterator[Sequence_]:
        """A text in windows that begin with bos; eos ends it where it is `closed`."""
        ids = self._ids(text) + (self.last if closed else [])
        step = self.max_length - len(self.first)
        for start in range(0, len(ids), step):
            window = torch.tensor([*self.first, *ids[start : start + step]], dtype=torch.int32)
            if len(window) >= _LEAST:
                yield window, _labels(window.tolist())

    def _tokens(self, example: Example) -> tuple[list[int], list[bool]] | None:
        """The tokens of a conversation, and which are trained on; None if it is refused."""
        if self.on_prompt and any(not turn.trained for turn in example.turns):
            self.unweighted.append(example.where)
        if self.conversations is None:
            return self._headed(example)
        found = self.conversations.write(example)
        if isinstance(found, NotRendered):
            self.refused.append(Unreadable(f"{example.where}: the chat template {found.why}"))
            return None
        if found.only_last:
            self.only_last.append(example.where)
        if not found.ended:
            self.unended.append(example.where)
        return self._aligned(found.text, found.spans)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _headed(self, example: Example) -> tuple[list[int], list[bool]] | None:
        """Without a chat template: a heading for each message, eos after each answer."""
        ids, trained = list(self.first), [self.on_prompt] * len(self.first)
        for number, turn in enumerate(example.turns):
            if not turn.content.strip():
                found = f"message {number + 1} ({turn.role}) has no text"
                why = f"{found}, and there is no chat template to write its tool_calls"
                self.refused.append(Unreadable(f"{example.where}: {why}"))
                return None
            before = ("\n\n" if number else "") + _HEADINGS[turn.role]
            answer = turn.role == "assistant"
            pieces = (
                [self._ids(before), self._ids(turn.content) + self.last]
                if answer
                else [self._ids(before + turn.content)]
            )
            for tokens, learned in zip(pieces, (False, turn.trained), strict=False):
                ids += tokens
                trained += [learned or self.on_prompt] * len(tokens)
        if not self.last:
            self.unended.append(example.where)
        return ids, trained

    def _aligned(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """The tokens of a text, and which of them reach into one of the spans."""
        if not self.tokenizer.is_fast:
            return self._aligned_by_prefix(text, spans)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        trained = [
            any(start < max(after, at + 1) and at < end for start, end in spans)
            for at, after in found["offset_mapping"]
        ]
        return found["input_ids"], trained

    def _aligned_by_prefix(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """The same by a tokenizer that does not say where its tokens stand.

        The tokens that a text and its beginning have in common stand within the beginning; the next one reaches across.
        """
        ids = self._ids(text)
        trained = [False] * len(ids)
        for start, end in spans:
            first = common(ids, self._ids(text[:start]))
            before_end = self._ids(text[:end])
            last = common(ids, before_end)
            last += last < len(before_end)
            trained[first:last] = [True] * (min(last, len(ids)) - first)
        return ids, trained


def _labels(values: list[int]) -> Tensor:
    """The first token of an example is never learned: nothing stands before it, or another example does."""
    return torch.tensor([IGNORED, *values[1:]], dtype=torch.int32)


def _counted(keys: dict[str, int]) -> str:
    """Keys with the number of records that have them, the most frequent first."""
    ordered = sorted(keys.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""  # noqa: PLR2004 # as many as fit on a line
    return ", ".join(f"{key[:40]} (in {count:,})" for key, count in ordered[:8]) + more
