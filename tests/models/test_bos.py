"""Which token `--bos` means, with and without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from command import run
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from mwtool.errors import NoBos
from mwtool.models.bos import PROMPT, find_bos

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "Apple": 3, "pear": 4, "7": 5, "auto": 6}
VOCABULARY = 10


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Words of a small vocabulary; every text is encoded with <s> in front unless special tokens are left out."""
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


def config(bos: int | None = None, eos: int | list[int] | None = None) -> PretrainedConfig:
    made = PretrainedConfig(bos_token_id=bos, eos_token_id=eos)
    made.vocab_size = VOCABULARY
    return made


WITH_BOS, WITHOUT = tokenizer(bos_token="<s>", eos_token="</s>"), tokenizer(eos_token="</s>")


def test_auto_takes_the_tokenizer_s_bos_before_the_configuration_s() -> None:
    found = find_bos("auto", WITH_BOS, config(bos=4))
    assert (found.id, found.token, found.how, found.note) == (1, "<s>", "tokenizer", None)


def test_auto_takes_the_configuration_s_where_the_tokenizer_has_none() -> None:
    found = find_bos("auto", WITHOUT, config(bos=4))
    assert (found.id, found.token, found.how, found.note) == (4, "pear", "config", None)
    assert find_bos("auto", None, config(bos=4)).token is None


@pytest.mark.parametrize("eos", [4, [7, 4]])
def test_a_bos_that_is_also_the_eos_is_said_aloud(eos: int | list[int]) -> None:
    assert "also its eos (4)" in str(find_bos("auto", None, config(bos=4, eos=eos)).note)
    assert "also its eos (</s>)" in str(find_bos("auto", tokenizer(bos_token="</s>", eos_token="</s>"), config()).note)


def test_always_is_the_tokenizer_s_and_nothing_else() -> None:
    assert find_bos("always", WITH_BOS, config(bos=4)).id == 1
    for without in (WITHOUT, None):
        with pytest.raises(NoBos, match=r"the tokenizer names no bos; say .* --bos TOKEN"):
            find_bos("always", without, config(bos=4))


def test_without_any_bos_one_is_asked_for() -> None:
    for without in (WITHOUT, None):
        with pytest.raises(NoBos, match=r"neither the tokenizer nor the configuration names a bos; say .* --bos TOKEN"):
            find_bos("auto", without, config())


def test_never_is_the_first_token_of_the_prompt_without_special_tokens() -> None:
    found = find_bos("never", WITH_BOS, config(), "pear Apple")
    assert (found.id, found.token, found.how) == (4, "pear", "none")
    assert "'pear Apple'" in str(found.note)
    assert find_bos("never", WITH_BOS, config()).token == "Apple"  # the paper's prompt
    assert PROMPT.startswith("Apple")


def test_never_needs_a_tokenizer_and_a_prompt_with_tokens() -> None:
    with pytest.raises(NoBos, match="needs a tokenizer"):
        find_bos("never", None, config(bos=1))
    with pytest.raises(NoBos, match="has no tokens"):
        find_bos("never", WITH_BOS, config(), "  ")


def test_a_token_or_an_id_may_be_given() -> None:
    for choice, token_id, token in (("pear", 4, "pear"), ("4", 4, "pear"), ("9", 9, None), ("7", 7, None)):
        found = find_bos(choice, WITH_BOS, config())
        assert (found.id, found.token, found.how) == (token_id, token, "given")
    assert find_bos("4", None, config()).id == 4


@pytest.mark.parametrize("choice", ["10", "-1", "-9", "999999999999999999"])
def test_an_id_outside_the_vocabulary_is_refused(choice: str) -> None:
    for either in (WITH_BOS, None):
        with pytest.raises(NoBos, match=rf"{choice} \(given\) is outside the vocabulary of 10"):
            find_bos(choice, either, config())


def test_a_configuration_s_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(NoBos, match=r"10 \(config\) is outside the vocabulary of 10"):
        find_bos("auto", None, config(bos=10))


@given(st.one_of(st.text(), st.integers().map(str), st.sampled_from(list(WORDS))), st.booleans())
def test_any_choice_gives_a_token_of_the_vocabulary_or_is_refused(choice: str, with_tokenizer: bool) -> None:  # noqa: FBT001 - drawn, never called
    try:
        found = find_bos(choice, WITH_BOS if with_tokenizer else None, config(bos=1))
    except NoBos:  # and nothing else
        return
    assert 0 <= found.id < VOCABULARY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.saved(tmp_path_factory.mktemp("model"), tiny.model("llama"))
    WITH_BOS.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"id": 1, "token": "<s>", "how": "tokenizer"}),
        (["--bos", "pear"], {"id": 4, "token": "pear", "how": "given"}),
        (["--bos", "9"], {"id": 9, "token": None, "how": "given"}),
        (["--bos", "never"], {"id": 3, "token": "Apple", "how": "none"}),
        (["--bos", "never", "--prompt", "pear"], {"id": 4, "token": "pear", "how": "none"}),
    ],
)
def test_what_was_fed_is_printed_and_recorded(folder: Path, arguments: list[str], expected: dict[str, object]) -> None:
    ran = run("scan", folder, "--json", *arguments)
    assert ran.document["bos"] == expected
    assert ("the first token of" in ran.err) == (expected["how"] == "none")
    shown = run("scan", folder, *arguments).out
    assert str(expected["id"]) in shown
    assert expected["token"] is None or str(expected["token"]) in shown


def test_what_is_fed_is_what_the_states_are_of(folder: Path) -> None:
    documents = [run("scan", folder, "--bos", token, "--json").document for token in ("1", "<s>", "3")]
    first, same, other = (json.dumps(document["layers"]) for document in documents)
    assert first == same
    assert first != other
