"""Examples as token ids: what is trained on, what fits, what shares a row."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mwtool.errors import BadValue, UnsupportedModel
from mwtool.finetune.data import Data
from mwtool.finetune.records import Example, Form, Turn
from mwtool.finetune.sequences import IGNORED, Encoded, collate, split
from mwtool.finetune.tokenize import encode
from mwtool.finetune.trainer import refuse_mixing
from mwtool.models.source import DEMO

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = "{{ raise_exception('roles must alternate') }}"
TALK = (Turn("user", "Say hi"), Turn("assistant", "Hi there"), Turn("user", "Again"), Turn("assistant", "Hi twice"))


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@cache
def bundled() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def templated(template: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = template
    return tokenizer


def data(*examples: Example, form: Form = "messages", stream: bool = False) -> Data:
    return Data(name="rows.jsonl", form=form, examples=examples, stream=stream)


def talk(*turns: Turn) -> Example:
    return Example(where="rows.jsonl, line 1", turns=turns)


def learned(encoded: Encoded, tokenizer: Any, at: int = 0) -> str:
    labels = encoded.labels[at]
    return str(tokenizer.decode(labels[labels != IGNORED]))


def whole(encoded: Encoded, tokenizer: Any, at: int = 0) -> str:
    return str(tokenizer.decode(encoded.ids[at]))


@pytest.mark.parametrize("stream", [False, True])
def test_windows_of_a_text_begin_with_bos_and_lose_nothing(plain: Any, *, stream: bool) -> None:
    text = "The house stood on a hill. " * 20
    encoded = encode(data(Example(where="", text=text), form="text", stream=stream), plain, 16)
    assert all(ids[0] == plain.bos_token_id and len(ids) <= 16 for ids in encoded.ids)
    joined = [token for ids in encoded.ids for token in ids[1:].tolist()]
    assert joined == plain(text, add_special_tokens=False)["input_ids"] + ([] if stream else [plain.eos_token_id])
    assert all(torch.equal(ids[1:], labels[1:]) for ids, labels in zip(encoded.ids, encoded.labels, strict=True))
    assert all(labels[0] == IGNORED for labels in encoded.labels)


def test_without_a_template_answers_and_their_end_are_learned_and_headings_are_not(plain: Any) -> None:
    encoded = encode(data(talk(*TALK)), plain, 200)
    assert learned(encoded, plain) == "Hi there</s>Hi twice</s>"
    assert whole(encoded, plain).startswith("<s>### Instruction:\nSay hi\n\n### Response:\nHi there</s>")
    assert "<s>" + learned(encode(data(talk(*TALK)), plain, 200, on_prompt=True), plain) == whole(encoded, plain)


def test_the_chat_template_is_followed_and_answers_are_what_it_adds_for_them() -> None:
    tokenizer = templated(CHATML)
    encoded = encode(data(talk(*TALK)), tokenizer, 200)
    assert whole(encoded, tokenizer) == tokenizer.apply_chat_template(
        [{"role": one.role, "content": one.content} for one in TALK], tokenize=False
    )
    assert learned(encoded, tokenizer).replace("\n", "") == "Hi there</s>Hi twice</s>"


def test_where_answers_are_written_differently_later_the_last_one_is_learned_and_it_is_said() -> None:
    tokenizer = templated(THINKING)
    encoded = encode(data(talk(*TALK)), tokenizer, 200)
    assert learned(encoded, tokenizer) == "<think></think>Hi twice</s>\n"
    assert "of 1 conversations only the last answer is trained on" in encoded.notes[0]


def test_a_conversation_the_template_refuses_is_a_row_that_cannot_be_read() -> None:
    tokenizer = templated(STRICT)
    with pytest.raises(
        BadValue, match=r"1 of 1 records .* line 1: the chat template refuses it \(roles must alternate"
    ):
        encode(data(talk(*TALK)), tokenizer, 200)
    half = templated("{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + CHATML)
    rows = data(talk(*TALK), talk(Turn("user", "no"), Turn("assistant", "yes")))
    left = encode(rows, half, 200, skip_bad=True)
    assert (len(left), len(left.refused)) == (1, 1)


def test_without_a_template_the_headings_are_told_and_text_has_none(plain: Any) -> None:
    (said,) = encode(data(talk(*TALK)), plain, 200).notes
    assert "no chat template" in said
    assert "### Instruction: ... ### Response: ..." in said
    assert encode(data(Example(where="a.txt, line 1", text="plain words")), plain, 200).notes == ()


def test_examples_that_are_too_long_are_left_out_and_counted(plain: Any) -> None:
    long = talk(Turn("user", "why " * 90), Turn("assistant", "so"))
    encoded = encode(data(talk(*TALK), long), plain, 64)
    assert (len(encoded), [one.reason for one in encoded.left_out]) == (1, ["too_long"])
    assert (
        encoded.notes[0] == "1 of 2 examples are longer than 64 tokens (--max-length) and left out: rows.jsonl, line 1"
    )
    with pytest.raises(BadValue, match=r"all 2 examples of rows\.jsonl are longer than 8 tokens: raise --max-length"):
        encode(data(talk(*TALK), long), plain, 8)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_what_is_held_out_and_what_is_trained_on_are_all_and_apart(plain: Any, share: float) -> None:
    encoded = encode(data(Example(where="", text="word " * 400), form="text"), plain, 8)
    trained, held = split(encoded, share, 3)
    count = 0 if held is None else len(held)
    assert (len(trained) + count, count) == (len(encoded), round(share * len(encoded)))
    again = split(encoded, share, 3)[0]
    assert all(torch.equal(one, other) for one, other in zip(trained.ids, again.ids, strict=True))


def test_too_few_sequences_to_hold_any_out_are_refused(plain: Any) -> None:
    encoded = encode(data(talk(*TALK)), plain, 200)
    with pytest.raises(BadValue, match="1 sequences are too few to hold 5% out"):
        split(encoded, 0.05, 0)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_packing_puts_every_example_into_one_row_that_has_room(lengths: list[int]) -> None:
    tokenizer = bundled()
    rows = [talk(Turn("user", "a"), Turn("assistant", "b " * length)) for length in lengths]
    apart, packed = (encode(data(*rows), tokenizer, 96, packing=packing) for packing in (False, True))
    assert all(len(ids) <= 96 for ids in packed.ids)
    assert sorted(length for one in packed.lengths for length in one) == sorted(len(ids) for ids in apart.ids)
    assert packed.trained_tokens == apart.trained_tokens
    assert len(packed) <= len(apart)


def test_packed_examples_give_the_losses_they_give_alone(plain: Any) -> None:
    model = tiny.model("llama", vocab_size=4096).eval()
    rows = [talk(Turn("user", "Say " + "it " * n), Turn("assistant", "Hi " * (n + 1))) for n in range(4)]
    apart, packed = (encode(data(*rows), plain, 64, packing=packing) for packing in (False, True))
    assert len(packed) < len(apart)
    sums = []
    for encoded in (apart, packed):
        batch = collate([encoded[at] for at in range(len(encoded))])
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
        sums.append(loss.item())
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_a_model_in_which_packed_examples_see_each_other_is_refused() -> None:
    refuse_mixing(tiny.model("llama").eval())
    with pytest.raises(UnsupportedModel, match="bloom lets packed examples see each other; leave out --packing"):
        refuse_mixing(tiny.model("bloom").eval())
