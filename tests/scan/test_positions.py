"""States by position: with bos in each place they are those of that sequence alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from words import planted_folder

import mwtool
from mwtool.errors import BadValue
from mwtool.models.locate import locate
from mwtool.scan.given import text_or_file
from mwtool.scan.positions import BINS
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.settings import Settings, Texts
from mwtool.scan.sinks import importance

TEXT = "w4 w30 w7 w7 w21"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("planted"), num_hidden_layers=6)


@pytest.fixture(scope="module")
def scan(folder: Path) -> mwtool.Scan:
    return scan_checkpoint(str(folder), Settings(texts=Texts(positions=TEXT, attention=True)))


def test_bos_is_at_the_start_in_the_middle_at_the_end_and_absent(scan: mwtool.Scan) -> None:
    assert scan.positions is not None
    ids = [3 + int(word[1:]) for word in TEXT.split()]
    found = {one.where: (one.at, list(one.ids)) for one in scan.positions.placements}
    assert found == {
        "start": (0, [1, *ids]),
        "middle": (2, [*ids[:2], 1, *ids[2:]]),
        "end": (5, [*ids, 1]),
        "absent": (None, ids),
    }
    assert scan.positions.placements[0].tokens == ("<s>", *TEXT.split())


def test_each_is_what_the_model_computes_of_that_sequence_alone(scan: mwtool.Scan, folder: Path) -> None:
    """The shorter sequence shares a forward with longer ones, behind which it is filled up."""
    assert scan.positions is not None
    assert scan.massive is not None
    layer = scan.massive.layer
    model: Any = tiny.opened(folder)
    model.set_attn_implementation("eager")
    inputs: list[torch.Tensor] = []
    model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    for one in scan.positions.placements:
        with torch.no_grad():
            output = model(torch.tensor([one.ids]), output_hidden_states=True, output_attentions=True, use_cache=False)
        h, z = output.hidden_states[layer + 1][0], inputs[-1][0]
        for states, expected in ((one.hidden, h), (one.intermediate, z)):
            for state, vector in zip(states, expected, strict=True):
                index, value = state.top[0]
                assert value == pytest.approx(float(vector[index]), rel=1e-4)
                assert abs(value) == pytest.approx(float(vector.abs().max()), rel=1e-4)
                assert state.median == pytest.approx(float(vector.abs().quantile(0.5)), rel=1e-3)
                assert max(state.bins) == pytest.approx(abs(value))
        received = torch.stack([importance(one)[0].mean(0) for one in output.attentions])
        assert one.before == pytest.approx(received[: layer + 1].mean(0).tolist(), rel=1e-4)
        assert one.after == pytest.approx(received[layer + 1 :].mean(0).tolist(), rel=1e-4)
        assert [found.layer for found in one.maps] == [layer - 1, layer, layer + 1]
        weights = output.attentions[layer][0].mean(0)
        assert torch.tensor(one.maps[1].weights).flatten().tolist() == pytest.approx(
            weights.flatten().tolist(), rel=1e-3, abs=1e-6
        )


def test_the_bins_divide_all_dimensions_in_order(scan: mwtool.Scan) -> None:
    assert scan.positions is not None
    state = scan.positions.placements[0].intermediate[0]
    width = scan.identity.intermediate_size
    index, value = state.top[0]
    assert len(state.bins) == min(BINS, width)
    assert state.bins[index * len(state.bins) // width] == pytest.approx(abs(value))


def test_under_bos_never_the_text_runs_alone(folder: Path) -> None:
    found = scan_checkpoint(str(folder), Settings(bos="never", prompt="w4", texts=Texts(positions=TEXT)))
    assert found.positions is not None
    assert [one.where for one in found.positions.placements] == ["absent"]


def test_a_long_text_is_cut_and_said_so(folder: Path) -> None:
    wanted = Settings(texts=Texts(positions="w1 " * 50, most=8))
    found = scan_checkpoint(locate(str(folder)), wanted)
    assert found.positions is not None
    assert [len(one.ids) for one in found.positions.placements] == [9, 9, 9, 8]
    assert "--positions: the first 8 of 50 tokens are shown" in found.notes


def test_without_a_massive_layer_the_layer_with_the_largest_entry_is_shown(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path, num_hidden_layers=4)
    found = scan_checkpoint(
        str(folder), Settings(thresholds=mwtool.Thresholds(magnitude=1e9), texts=Texts(positions=TEXT))
    )
    largest = max(found.states[:-1], key=lambda state: float(state.hidden.abs().max()))
    assert found.massive is None
    assert found.positions is not None
    assert found.positions.layer == largest.layer


def test_a_text_is_itself_unless_it_names_a_file(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("from a file")
    assert text_or_file(str(file)) == "from a file"
    assert text_or_file("Winter") == "Winter"
    assert text_or_file("in a/b, or c.txt") == "in a/b, or c.txt"
    with pytest.raises(BadValue, match=r"absent\.txt does not exist"):
        text_or_file("absent.txt")
    with pytest.raises(BadValue, match="no text"):
        text_or_file(" ")


def test_attention_maps_need_a_text() -> None:
    with pytest.raises(BadValue, match="give that with --positions"):
        Texts(attention=True)
