"""MacDrop on rows of two layers at once, against the same written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from training import ROWS, digest, frozen, loss_of, massive, with_adapter

from mwtool.errors import BadValue
from mwtool.macdrop.curriculum import Curriculum, curriculum_of
from mwtool.macdrop.curriculum_yaml import parse_curriculum
from mwtool.macdrop.engine import MacDrop

TWO = (1, 2)


def engine(model: Any, curriculum: Any = "constant:0.5", layers: tuple[int, ...] = TWO) -> MacDrop:
    return MacDrop(model, [massive(model, layer) for layer in layers], curriculum, steps=4)


@pytest.mark.parametrize("masks", ["shared", "separate"])
def test_entries_of_both_layers_are_dropped_by_masks_of_their_own_and_all_else_stays(masks: Any) -> None:
    model = frozen()
    before, macdrop = digest(model), engine(model, curriculum_of("constant:0.5", masks=masks))
    ffns = [tiny.layers_of(model)[layer].ffns[0] for layer in TWO]
    plain = [[place.read(model).clone() for place in ffn.inputs] for ffn in ffns]
    drawn = [macdrop.mask(3, place=at).expand(2, -1, -1) for at in range(2)]
    assert not torch.equal(drawn[0], drawn[1])
    with macdrop.step(3):
        for ffn, olds, mask in zip(ffns, plain, drawn, strict=True):
            for place, old, keep in zip(ffn.inputs, olds, mask, strict=True):
                now = place.read(model)
                assert torch.equal(now[list(ROWS)], old[list(ROWS)] * keep)
                now[list(ROWS)] = old[list(ROWS)]
        assert digest(model) == before  # with the rows put back by hand, nothing differs
    assert digest(model) == before


def test_the_first_layer_is_masked_as_it_is_alone() -> None:
    model = frozen()
    alone = MacDrop(model, massive(model), "constant:0.5", steps=4)
    assert torch.equal(engine(model).mask(2), alone.mask(2))
    assert engine(model).rows == [*ROWS, *ROWS]
    assert engine(model).kept_bytes == 2 * alone.kept_bytes


def test_training_on_two_layers_is_algorithm_1_written_out_by_hand() -> None:
    trained, by_hand = (with_adapter(frozen(), trained=True) for _ in range(2))
    macdrop = engine(trained.get_base_model(), "step:0.8")
    optimizers = [
        torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1) for one in (trained, by_hand)
    ]
    for t in range(1, 5):
        with macdrop.step(t):
            loss_of(trained).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        base: Any = by_hand.get_base_model()
        places = [place for layer in TWO for place in tiny.layers_of(base)[layer].ffns[0].inputs]
        kept = [place.read(base)[list(ROWS)].clone() for place in places]
        for at, place in enumerate(places):
            place.read(base)[list(ROWS)] = kept[at] * macdrop.mask(t, place=at // 2)[0]
        loss_of(by_hand).backward()
        for place, old in zip(places, kept, strict=True):
            place.read(base)[list(ROWS)] = old
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert digest(trained) == digest(by_hand)


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_both_layers_are_restored_when_a_step_fails(fault: type[BaseException]) -> None:
    model = frozen()
    before = digest(model)
    with pytest.raises(fault), engine(model).step(1):  # noqa: PT012 - what the step does is looked at inside it
        assert digest(model) != before
        raise fault
    assert digest(model) == before


def test_a_curriculum_of_layers_takes_those_of_the_rows_given() -> None:
    model = frozen()
    chosen = Curriculum(phases=curriculum_of("constant:0.5").phases, layers=(2,))
    assert [place.ffn.module for place in engine(model, chosen).places] == ["model.layers.2.mlp"]
    with pytest.raises(BadValue, match="names layer 0, but rows are given only for 1, 2"):
        engine(model, Curriculum(phases=chosen.phases, layers=(0,)))
    with pytest.raises(BadValue, match="rows of layer 1 are given twice"):
        engine(model, layers=(1, 1))
    with pytest.raises(BadValue, match="no massive weights"):
        engine(model, layers=())


def test_layers_in_a_curriculum_file_are_different_numbers() -> None:
    assert parse_curriculum("schedule: step:0.8\nlayers: [2, 11]\n").layers == (2, 11)
    assert parse_curriculum("schedule: step:0.8\n").layers == ()
    for content, fault in (
        ("layers: 2", "line 2, character 9: layers must be a list of numbers"),
        ("layers: []", "layers must be a list of numbers"),
        ("layers: [2, -1]", "line 2, character 13: a layer is '-1'; expected a layer's number, 0 or more"),
        ("layers: [2, 2]", "line 2, character 13: layer 2 is named twice"),
        ("layers: [x]", "a layer is 'x'"),
    ):
        with pytest.raises(BadValue, match="curriculum, ") as raised:
            parse_curriculum(f"schedule: step:0.8\n{content}\n")
        assert fault in str(raised.value)
