"""The sink rate against a loop over what transformers returns with output_attentions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from words import planted_folder, with_tokenizer

from mwtool.errors import NoBos, UnsupportedModel
from mwtool.models.locate import locate
from mwtool.scan import texts
from mwtool.scan.settings import Settings, Texts
from mwtool.scan.sinks import importance, sink_rates
from mwtool.scan.subject import in_memory, streamed

LENGTH, EPS = 16, 0.1


def settings(folder: Path, **changes: Any) -> Settings:
    wanted = Texts(sinks=str(folder / "text.txt"), sink_length=LENGTH, eps=EPS)
    return Settings(texts=replace(wanted, **changes))


def heedful(folder: Path) -> Path:
    """A model whose queries and keys are so large that its attention is far from even."""
    model = tiny.model("llama", num_hidden_layers=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(4)
    return with_tokenizer(folder, model)


def by_hand(folder: Path) -> dict[int, list[tuple[float, float]]]:
    """Layer -> rate and score of each head, by the definition and with nothing of mwtool's."""
    model: Any = tiny.opened(folder)
    model.set_attn_implementation("eager")
    words = (folder / "text.txt").read_text().split()
    ids = [3 + int(word[1:]) for word in words]
    scores: dict[int, list[list[float]]] = {}
    for start in range(0, len(ids) - LENGTH + 2, LENGTH - 1):
        window = torch.tensor([[tiny.BOS, *ids[start : start + LENGTH - 1]]])
        with torch.no_grad():
            found = model(input_ids=window, output_attentions=True, use_cache=False).attentions
        for layer, weights in enumerate(found):
            mean = [sum(float(head[i, 0]) for i in range(LENGTH)) / LENGTH for head in weights[0]]
            scores.setdefault(layer, []).append(mean)
    return {
        layer: [(sum(one > EPS for one in head) / len(head), sum(head) / len(head)) for head in zip(*all_, strict=True)]
        for layer, all_ in scores.items()
    }


def test_it_is_the_part_of_windows_in_which_a_head_attends_to_the_first_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "TOGETHER", 3 * LENGTH)  # two forwards of 3 windows: sums run over both
    folder = heedful(tmp_path)
    found = sink_rates(streamed(locate(str(folder)), settings(folder)), settings(folder))
    expected = by_hand(folder)
    assert (found.windows, found.length) == (6, LENGTH)
    assert 0 < found.rate < 1  # else any threshold would do
    for one in found.layers:
        assert one.rates == pytest.approx([rate for rate, _ in expected[one.layer]])
        assert one.scores == pytest.approx([score for _, score in expected[one.layer]], rel=1e-5)  # batched or not
    assert found.rate == pytest.approx(sum(one.rate for one in found.layers) / 4)


def test_importance_is_the_mean_over_the_queries_that_see_a_position() -> None:
    weights = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]).reshape(1, 1, 3, 3)
    assert importance(weights)[0, 0].tolist() == pytest.approx([1.7 / 3, 0.8 / 2, 0.5])


def test_no_more_windows_are_read_than_asked_for(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path, num_hidden_layers=2)
    wanted = settings(folder, sink_windows=2)
    assert sink_rates(streamed(locate(str(folder)), wanted), wanted).windows == 2


def test_a_text_shorter_than_a_window_is_read_as_one_and_said_so(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path, num_hidden_layers=2, max_position_embeddings=1024)
    wanted = settings(folder, sink_length=512)
    found = sink_rates(streamed(locate(str(folder)), wanted), wanted)
    assert (found.windows, found.length) == (1, 96)
    assert "fewer than a window of 512" in found.notes[0]


def test_a_model_that_hands_out_no_attention_weights_is_refused(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path, "falcon", num_hidden_layers=2)
    with pytest.raises(UnsupportedModel, match="FalconForCausalLM hands out no attention weights"):
        sink_rates(streamed(locate(str(folder)), settings(folder)), settings(folder))


def test_without_a_tokenizer_the_message_says_which_options_need_one(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path, num_hidden_layers=2)
    with pytest.raises(NoBos, match="leave out --positions, --sinks and --text"):
        sink_rates(in_memory(tiny.opened(folder), None, Settings(bos="1")), settings(folder))
