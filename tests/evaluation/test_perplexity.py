"""Perplexity is what a plain loop gives, for every protocol, however it is cut into batches and chunks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast
from words import WORDS, adding_bos, with_tokenizer

from mwtool.errors import BadValue, NoBos
from mwtool.evaluation import chunked_loss as head
from mwtool.evaluation.batches import tokens_at_once
from mwtool.evaluation.corpora import default_protocol, text_for
from mwtool.evaluation.perplexity import measure_perplexity, perplexity, summarize
from mwtool.evaluation.windows import PROTOCOLS, Text, Windows, _cut, windows

TEXT = " ".join(WORDS[(7 * number * number + 3 * number) % 40] for number in range(95))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = with_tokenizer(tmp_path_factory.mktemp("tokenizer"), tiny.model("llama", num_hidden_layers=2))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def one_window(ids: torch.Tensor) -> Windows:
    units = (len(ids) - 1,)
    return Windows(
        ids=(ids,), scored=units, sample=(0,), units=units, protocol="sun-4096", metric="perplexity", length=len(ids),
        bos=None,
    )  # fmt: skip


def by_a_loop(model: Any, cut: Windows) -> float:
    """Window by window, whole logits, float64."""
    total = 0.0
    for ids, scored in zip(cut.ids, cut.scored, strict=True):
        with torch.no_grad():
            likely = model(input_ids=ids[None, : cut.length]).logits[0].double().log_softmax(-1)
        targets = ids[1 : len(likely) + 1]
        total -= float(likely[: len(targets)].gather(1, targets[:, None])[-scored:].sum())
    return math.exp(total / sum(cut.units))


@pytest.mark.parametrize("protocol", ["bos", "bos-4096", "sun-4096", "word"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "cohere", "granite", "mixtral"])
def test_it_is_that_of_a_plain_float64_loop(tokenizer: Any, model_type: str, protocol: Any) -> None:
    """gemma2 caps its logits, cohere and granite scale them, gpt2 has a position for each token and no more."""
    model = tiny.model(model_type, num_hidden_layers=2)
    cut = windows(tokenizer, Text((TEXT, TEXT[: len(TEXT) // 3])), protocol, 16, tiny.BOS)
    for size in (None, 1, 3):
        found = perplexity(model, cut, batch_size=size)
        assert found.value == pytest.approx(by_a_loop(model, cut), rel=1e-6)
    assert found.notes == ()


@pytest.mark.parametrize("protocol", ["bos", "sun-4096"])
def test_from_python_it_is_the_same_and_leaves_the_mode_as_it_was(tokenizer: Any, protocol: Any) -> None:
    model = tiny.model("llama", num_hidden_layers=2, attention_dropout=0.5, max_position_embeddings=32).train()
    cut = windows(tokenizer, TEXT, protocol, 16, tiny.BOS)
    found = measure_perplexity(model, tokenizer, TEXT, protocol=protocol, window=16)
    assert model.training
    assert found.value == pytest.approx(by_a_loop(model.eval(), cut), rel=1e-6)
    assert measure_perplexity(model, tokenizer, "w1 w2").notes == (
        "windows of 4096 tokens are shortened to the 32 positions of the model",
        "the text has 2 tokens, fewer than a window of 31: it is evaluated as one short window",
    )
    with pytest.raises(NoBos, match="sun-4096"):
        measure_perplexity(model, tokenizer, TEXT, bos="never")


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_in_bfloat16_the_chunked_loss_is_the_unchunked_one_on_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    model = tiny.model(model_type, torch.bfloat16, num_hidden_layers=2)
    ids = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    monkeypatch.setattr(head, "positions_per_chunk", lambda *_: 7)
    seen = []
    plain = head.Head._logits
    monkeypatch.setattr(head.Head, "_logits", lambda *args: seen.append(plain(*args)) or seen[-1])
    with torch.inference_mode():
        whole = head.head_of(model, ids)
        seen.clear()
        losses = whole.losses(ids, scored, 40, torch.device("cpu"))
    assert [len(chunk) for chunk in seen] == [7] * 11 + [1]
    logits = torch.cat(seen)
    assert logits.dtype == torch.bfloat16
    assert losses.equal(cross_entropy(logits.float(), ids[scored], reduction="none"))


def test_the_logits_of_a_window_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama", num_hidden_layers=2, vocab_size=8192)
    cut = one_window(torch.arange(3, 99))
    monkeypatch.setattr(head, "LEAST", 2**16)
    sizes = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(out.numel() * out.element_size()))
    perplexity(model, cut)
    hidden = 96 * model.config.hidden_size * 4
    chunks = sizes[2:]  # behind those of the few tokens on which the two ways are compared
    assert max(chunks) <= max(8 * hidden, 2**16)
    assert len(chunks) > 10
    for device, rows in (("meta", 512), ("cpu", 128)):  # the first stands for any but a CPU, whose caches are small
        hidden_states = torch.empty(2, 4096, 2048, dtype=torch.bfloat16, device=device)
        assert head.positions_per_chunk(hidden_states, 128_256) == rows


def test_a_model_whose_logits_do_not_follow_from_its_hidden_state_runs_whole_and_says_so() -> None:
    model = tiny.model("llama", num_hidden_layers=2)
    cut = one_window(torch.arange(3, 35))

    def copying(_module: Any, _args: Any, options: Any, out: Any) -> None:
        out.logits += 9 * torch.nn.functional.one_hot(options["input_ids"], 64)

    model.register_forward_hook(copying, with_kwargs=True)
    found = perplexity(model, cut)
    assert found.value == pytest.approx(by_a_loop(model, cut), rel=1e-6)
    assert "depend on more than its last hidden state: the logits of whole windows are held" in found.notes[0]


@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_batch_size_given_is_the_one_that_runs(tokenizer: Any, size: int) -> None:
    model = tiny.model("llama", num_hidden_layers=2)
    cut = windows(tokenizer, TEXT, "bos", 16, tiny.BOS)
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    told: list[tuple[int, int]] = []
    perplexity(model, cut, batch_size=size, on_batch=lambda done, total: told.append((done, total)))
    expected = [size] * (7 // size) + [7 % size] * (7 % size > 0)
    assert seen[1:] == expected  # behind the one with which the head is tried
    assert told[-1] == (7, 7)


def test_without_a_batch_size_hidden_states_of_64_mb_run_at_once_and_on_a_cpu_what_its_caches_hold() -> None:
    found = {
        (device, width): tokens_at_once(torch.empty(1, width, dtype=torch.bfloat16, device=device))
        for device in ("meta", "cpu")  # the first stands for any other
        for width in (192, 2048, 8192)
    }
    assert [found["meta", width] for width in (192, 2048, 8192)] == [65536, 16384, 4096]
    assert [found["cpu", width] for width in (192, 2048, 8192)] == [2048] * 3


def test_bos_stands_in_front_of_every_window_once_though_the_tokenizer_adds_one(tokenizer: Any) -> None:
    tokenizer = adding_bos(tokenizer)
    assert tokenizer("w1").input_ids[0] == tiny.BOS
    for protocol in ("bos", "bos-4096"):
        cut = windows(tokenizer, TEXT, protocol, 16, tiny.BOS)
        assert {(int(ids[0]), int((ids == tiny.BOS).sum())) for ids in cut.ids} == {(tiny.BOS, 1)}
    word = windows(tokenizer, Text((TEXT, TEXT)), "word", 16, tiny.BOS)
    assert sum(int((ids == tiny.BOS).sum()) for ids, last in zip(word.ids, word.scored, strict=True) if last == 16) == 2
    assert not any((ids == tiny.BOS).any() for ids in windows(tokenizer, TEXT, "sun-4096", 16).ids)


def test_windows_do_not_overlap_and_only_the_default_keeps_the_end(tokenizer: Any) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    kept = {name: windows(tokenizer, TEXT, name, 16, tiny.BOS) for name in ("bos", "bos-4096", "sun-4096")}
    assert torch.cat([one[1:] for one in kept["bos"].ids]).tolist() == ids
    assert torch.cat([one[1:] for one in kept["bos-4096"].ids]).tolist() == ids[:90]
    assert torch.cat(kept["sun-4096"].ids).tolist() == ids[:80]


@given(st.integers(2, 40), st.integers(2, 12))
def test_each_token_of_a_document_is_scored_once_and_none_is_read_beyond_the_window(count: int, length: int) -> None:
    tokens = list(range(count))
    cut = list(_cut(tokens[1:], PROTOCOLS["word"], length, tokens[:1]))
    assert [token for window, last in cut for token in window[len(window) - last :]] == tokens[1:]
    assert all(len(window) <= length + 1 for window, _ in cut)


def test_nan_logits_are_named_and_not_averaged_away(tokenizer: Any) -> None:
    model = tiny.model("llama", num_hidden_layers=2)
    cut = windows(tokenizer, TEXT, "bos", 16, tiny.BOS)
    token = int(cut.ids[2][5])
    model.model.embed_tokens.weight.data[token] = math.nan
    first = next(at for at, ids in enumerate(cut.ids) if token in ids)
    found = perplexity(model, cut)
    assert math.isnan(found.value)
    assert found.stderr is None
    assert found.nonfinite is not None
    assert found.nonfinite.endswith(f"have no finite loss, the first is number {first}")


def test_a_perplexity_beyond_float64_is_infinite_and_said_to_be() -> None:
    found = summarize([1e6, 1e6], [10, 10], 0.0)
    assert found.value == math.inf
    assert "overflows float64" in str(found.nonfinite)


def test_the_standard_error_is_that_of_a_ratio_of_sums() -> None:
    nll, counts = [3.0, 8.0, 4.0], [2, 4, 3]
    mean = 15 / 9
    spread = sum((a - mean * n) ** 2 for a, n in zip(nll, counts, strict=True))
    assert summarize(nll, counts, 0.0).stderr == pytest.approx(math.exp(mean) * math.sqrt(spread * 3 / 2) / 9)


def test_a_protocol_with_bos_needs_one_and_a_text_needs_a_token(tokenizer: Any) -> None:
    with pytest.raises(NoBos, match="name it with --bos, or use sun-4096"):
        windows(tokenizer, TEXT, "bos", 16)
    with pytest.raises(BadValue, match="no token to score"):
        windows(tokenizer, "", "bos", 16, tiny.BOS)
    with pytest.raises(BadValue, match="a window of 1 tokens scores nothing"):
        windows(tokenizer, TEXT, "bos", 1, tiny.BOS)
    short = windows(tokenizer, "w1 w2 w3", "sun-4096", 16)
    assert [ids.tolist() for ids in short.ids] == [tokenizer("w1 w2 w3").input_ids]
    assert "3 tokens, fewer than a window of 16: it is evaluated as one short window" in short.notes[0]


def test_the_papers_datasets_have_the_papers_protocol_and_other_texts_bos(tmp_path: Path) -> None:
    names = ("wikitext2", "c4", "pg19", "demo", "x.txt")
    assert list(map(default_protocol, names)) == ["sun-4096"] * 3 + ["bos"] * 2
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert text_for(str(tmp_path / "rows.jsonl")).documents == ("one", "two")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(BadValue, match=r"rows\.jsonl, line 2: the key text has no string"):
        text_for(str(tmp_path / "rows.jsonl"))
