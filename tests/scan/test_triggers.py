"""Triggers in a text: every position whose state is massive is counted, by token and by dimension."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from words import planted_folder

from mwtool.errors import BadValue
from mwtool.files.document import text_of
from mwtool.files.schema import read_document
from mwtool.files.states_schema import TriggerDocument
from mwtool.scan import texts
from mwtool.scan.definitions import median
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.settings import Settings, Texts, Thresholds
from mwtool.scan.states_document import TOKENS, trigger_document
from mwtool.scan.triggers import massive_entries

LIMITS = Thresholds(magnitude=2.0, ratio=4.0)
"""So low that words of a random model are massive too."""


def settings(folder: Path, **changes: Any) -> Settings:
    wanted = Texts(triggers=str(folder / "text.txt"), length=16, windows=9)
    return Settings(thresholds=LIMITS, texts=replace(wanted, **changes))


def by_hand(folder: Path, layers: int) -> tuple[Counter[int], Counter[int], dict[int, float]]:
    """Massive occurrences by token and by dimension, and each token's largest entry, with nothing of mwtool's."""
    model: Any = tiny.opened(folder)
    ids = [3 + int(word[1:]) for word in (folder / "text.txt").read_text().split()]
    tokens: Counter[int] = Counter()
    dimensions: Counter[int] = Counter()
    largest: dict[int, float] = {}
    for start in range(0, len(ids) - 14, 15):
        window = [tiny.BOS, *ids[start : start + 15]]
        with torch.no_grad():
            states = model(torch.tensor([window]), output_hidden_states=True, use_cache=False).hidden_states
        for at, token in enumerate(window):
            massive = set()
            for layer in range(layers - 1):
                h = states[layer + 1][0, at].abs().double()
                limit = max(LIMITS.magnitude, LIMITS.ratio * float(h.quantile(0.5)))
                for d in (h > limit).nonzero()[:, 0].tolist():
                    massive.add(d)
                    largest[token] = max(largest.get(token, 0), float(h[d]))
            tokens[token] += bool(massive)
            dimensions.update(massive)
    return +tokens, dimensions, largest


def test_counts_are_those_of_a_loop_over_positions_and_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "TOGETHER", 4 * 16)  # two forwards
    folder = planted_folder(tmp_path, num_hidden_layers=4)
    found = scan_checkpoint(str(folder), settings(folder)).triggers
    assert found is not None
    tokens, dimensions, largest = by_hand(folder, 4)
    assert found.windows == 6
    assert len(tokens) > 2  # bos is not the only one
    assert {one.id: one.massive for one in found.tokens} == tokens
    assert dict(found.dimensions) == dimensions
    assert {one.id: abs(one.value) for one in found.tokens} == pytest.approx(largest, rel=1e-4)
    assert found.massive == sum(tokens.values())
    assert found.first == 6 == next(one.first for one in found.tokens if one.id == tiny.BOS)


def test_an_entry_is_massive_by_the_thresholds_of_the_scan() -> None:
    states = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) * 3
    expected = torch.stack(
        [
            torch.stack([h.abs() > max(LIMITS.magnitude, LIMITS.ratio * median(h.double())) for h in window])
            for window in states
        ]
    )
    assert 0 < int(expected.sum()) < expected.numel()
    assert torch.equal(massive_entries(states, LIMITS), expected)


def test_the_last_layer_counts_no_more_than_in_a_scan(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path, num_hidden_layers=2)
    found = scan_checkpoint(str(folder), settings(folder)).triggers
    assert found is not None
    assert {one.layer for one in found.tokens} <= {0}


def test_a_text_without_triggers_has_none(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path, num_hidden_layers=2)
    wanted = replace(settings(folder), thresholds=Thresholds(magnitude=1e9))
    found = scan_checkpoint(str(folder), wanted).triggers
    assert found is not None
    assert (found.massive, found.tokens, found.dimensions) == (0, (), ())


def test_the_file_for_masking_lists_every_token_and_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mwtool.scan.states_document.TOKENS", 1)
    folder = planted_folder(tmp_path, num_hidden_layers=4)
    scan = scan_checkpoint(str(folder), settings(folder))
    assert scan.triggers is not None
    assert 1 < len(scan.triggers.tokens) < TOKENS
    whole = trigger_document(scan)
    (tmp_path / "triggers.json").write_text(text_of(whole))
    _, read = read_document(tmp_path / "triggers.json", {"mwtool.triggers/1": TriggerDocument}, "mwtool scan")
    assert [one.id for one in read.triggers.tokens] == [one.id for one in scan.triggers.tokens]
    assert read.bos == tiny.BOS
    listed = scan.to_dict()["triggers"]
    assert (len(listed["tokens"]), listed["different"]) == (1, len(scan.triggers.tokens))
    with pytest.raises(ValueError, match="without a text"):
        trigger_document(scan_checkpoint(str(folder)))


def test_windows_are_no_longer_than_the_model_s_positions(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path, "gpt2", num_hidden_layers=2, max_position_embeddings=32)
    scan = scan_checkpoint(str(folder), settings(folder, length=512))
    assert scan.triggers is not None
    assert (scan.triggers.length, scan.triggers.windows) == (32, 3)
    assert "windows of 512 tokens are shortened to the 32 positions of the model" in scan.notes


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path, num_hidden_layers=2, vocab_size=20)
    with pytest.raises(BadValue, match="gives token 42 and the model has 20"):
        scan_checkpoint(str(folder), settings(folder))
