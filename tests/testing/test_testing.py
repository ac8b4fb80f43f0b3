"""The conformance kit catches every way an adapter may be wrong; each check can fail."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mwtool.architecture.layout import FFN, DecoderLayer, Experts, WeightSlice
from mwtool.architecture.registry import adapter_for
from mwtool.testing.kit import check_adapter, run_checks, tiny_config
from mwtool_adapters.gpt_oss import clamped_glu

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig


@dataclass
class Wrong:
    """The built-in adapter of a type with every FFN, or every layer, changed."""

    model_type: str
    ffn: Callable[[FFN], FFN] = lambda ffn: ffn
    decoder: Callable[[DecoderLayer], DecoderLayer] = lambda layer: layer

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        layer = adapter_for(self.model_type).layer(config, index)
        return self.decoder(replace(layer, ffns=tuple(self.ffn(ffn) for ffn in layer.ffns)))


class Copy(WeightSlice):
    """A slice that reads a copy: a write to it goes nowhere."""

    def read(self, model: torch.nn.Module) -> torch.Tensor:
        return super().read(model).clone()


def failed(adapter: Any, model_type: str) -> set[str]:
    config = tiny_config(model_type, adapter_for(model_type))
    return {check.name for check in run_checks(adapter, config) if not check.passed}


def copied(place: WeightSlice) -> WeightSlice:
    return Copy(place.param, place.index, place.transposed)


def renamed(place: WeightSlice, old: str, new: str) -> WeightSlice:
    return replace(place, param=place.param.replace(old, new))


def moved(place: WeightSlice | None) -> WeightSlice:
    """The same slice of the expert after this one."""
    assert place is not None
    expert, *rest = place.index
    assert isinstance(expert, int)
    return replace(place, index=((expert + 1) % 4, *rest))


def routed_alone(layer: DecoderLayer) -> tuple[FFN, ...]:
    return tuple(ffn for ffn in layer.ffns if ffn.expert is not None) or layer.ffns


def module_of(layer: DecoderLayer) -> str:
    assert layer.experts is not None
    return layer.experts.module


def of(layer: DecoderLayer, scores: Any) -> Experts | None:
    return layer.experts and replace(layer.experts, scores=scores)


LOOSE = partial(clamped_glu, limit=100.0, alpha=1.702)
MISTAKES: list[tuple[str, str, Any]] = [
    ("shapes", "a matrix that does not exist", Wrong("llama", ffn=lambda f: replace(f, up=WeightSlice("no.weight")))),
    (
        "shapes",
        "a Conv1D read as a Linear",
        Wrong("gpt2", ffn=lambda f: replace(f, up=replace(f.up, transposed=False))),
    ),
    ("shapes", "up and down exchanged", Wrong("opt", ffn=lambda f: replace(f, up_bias=f.down_bias))),
    ("shapes", "a module that does not exist", Wrong("llama", decoder=lambda d: replace(d, adds="model.nothing"))),
    ("shapes", "experts out of order", Wrong("mixtral", decoder=lambda d: replace(d, ffns=d.ffns[::-1]))),
    ("shapes", "experts without a router", Wrong("mixtral", decoder=lambda d: replace(d, experts=None))),
    ("writes", "a slice that is a copy", Wrong("llama", ffn=lambda f: replace(f, up=copied(f.up)))),
    ("output", "another activation", Wrong("gpt_neox", ffn=lambda f: replace(f, act="relu"))),
    ("output", "a bias left out", Wrong("phi", ffn=lambda f: replace(f, down_bias=None))),
    ("output", "gate and up exchanged", Wrong("phi3", ffn=lambda f: replace(f, up=f.gate, gate=f.up))),
    ("output", "an unclamped GLU", Wrong("gpt_oss", ffn=lambda f: replace(f, combine=None))),
    ("output", "another expert's down", Wrong("olmoe", ffn=lambda f: replace(f, down=moved(f.down)))),
    ("output", "another layer's down", Wrong("llama", ffn=lambda f: replace(f, down=renamed(f.down, "s.1.", "s.0.")))),
    ("gate/up", "one matrix as both", Wrong("llama", ffn=lambda f: replace(f, gate=f.up))),
    ("state", "a hook on the wrong matrix", Wrong("opt", ffn=lambda f: replace(f, hook=str(f.hook)[:-1] + "1"))),
    ("state", "another expert's up", Wrong("mixtral", ffn=lambda f: replace(f, up=moved(f.up)))),
    ("added", "a norm behind the FFN forgotten", Wrong("gemma2", decoder=lambda d: replace(d, adds=f"{d.path}.mlp"))),
    ("added", "a multiplier forgotten", Wrong("llama", decoder=lambda d: replace(d, scale=0.5))),
    ("added", "attention added in place too", Wrong("falcon", decoder=lambda d: replace(d, adds=d.path))),
    ("added", "the residual included", Wrong("bloom", decoder=lambda d: replace(d, adds=f"{d.path}.mlp"))),
    ("state", "a shared expert left out", Wrong("deepseek_v3", decoder=lambda d: replace(d, ffns=routed_alone(d)))),
    ("state", "probabilities by a sigmoid", Wrong("mixtral", decoder=lambda d: replace(d, experts=of(d, "sigmoid")))),
    ("state", "probabilities by a softmax", Wrong("glm4_moe", decoder=lambda d: replace(d, experts=of(d, "softmax")))),
    (
        "state",
        "another layer's router",
        Wrong("mixtral", decoder=lambda d: replace(d, experts=Experts(module_of(d), "model.layers.0.mlp.gate"))),
    ),
    (
        "state",
        "no router at all",
        Wrong("mixtral", decoder=lambda d: replace(d, experts=Experts(module_of(d), f"{d.path}.input_layernorm"))),
    ),
    ("added", "an earlier layer's path", Wrong("llama", decoder=lambda d: replace(d, path="model.layers.0"))),
    ("output", "a clamp that only large input reaches", Wrong("gpt_oss", ffn=lambda f: replace(f, combine=LOOSE))),
    ("output", "an activation that differs a little", Wrong("gemma2", ffn=lambda f: replace(f, act="gelu"))),
    ("shapes", "an unknown activation", Wrong("llama", ffn=lambda f: replace(f, act="silu2"))),
    ("shapes", "a list of rows", Wrong("llama", ffn=lambda f: replace(f, up=replace(f.up, index=([0, 1],))))),
    ("shapes", "rows backwards", Wrong("llama", ffn=lambda f: replace(f, up=replace(f.up, index=(slice(9, 0, -1),))))),
    ("shapes", "an FFN alone", Wrong("llama", decoder=lambda d: replace(d, ffns=d.ffns[0]))),
    ("shapes", "no index", Wrong("llama", ffn=lambda f: replace(f, up=replace(f.up, index=None)))),
    ("shapes", "no number", Wrong("llama", decoder=lambda d: replace(d, scale="0.5"))),
    ("zeroing", "the bias of a row forgotten", Wrong("phi", ffn=lambda f: replace(f, up_bias=None))),
    (
        "output",
        "the biases of experts forgotten",
        Wrong("gpt_oss", ffn=lambda f: replace(f, up_bias=None, gate_bias=None)),
    ),
]


@pytest.mark.parametrize(("check", "mistake", "adapter"), MISTAKES, ids=[mistake for _, mistake, _ in MISTAKES])
def test_a_mistake_fails_its_check(check: str, mistake: str, adapter: Wrong) -> None:
    assert check in failed(adapter, adapter.model_type)


def in_turn(ffn: FFN) -> FFN:
    """Gate and up of phi3's one matrix, which has them in halves, taken row by row in turn."""
    up, gate = (replace(ffn.up, index=(slice(first, None, 2),)) for first in (1, 0))
    return replace(ffn, up=up, gate=gate)


NEARBY: list[tuple[str, str, Any]] = [
    ("phi3", "gate and up exchanged", lambda f: replace(f, up=f.gate, gate=f.up)),
    ("phi3", "gate and up in halves", in_turn),
    ("phi3", "gate and up exchanged and act='silu'", lambda f: replace(f, up=f.gate, gate=f.up, act="gelu")),
    ("mixtral", "gate and up exchanged", lambda f: replace(f, up=f.gate, gate=f.up)),
    ("gpt_neox", "act='gelu'", lambda f: replace(f, act="relu")),
    ("gemma2", "act='gelu_pytorch_tanh'", lambda f: replace(f, act="gelu")),
    (
        "phi",
        "up_bias in model.layers.0.mlp.fc1.bias, down_bias in model.layers.0.mlp.fc2.bias",
        lambda f: replace(f, up_bias=None, down_bias=None),
    ),
    ("gpt2", "up_bias in transformer.h.0.mlp.c_fc.bias", lambda f: replace(f, up_bias=None)),
]


@pytest.mark.parametrize(("model_type", "remedy", "mistake"), NEARBY, ids=[f"{a}, {b}" for a, b, _ in NEARBY])
def test_a_description_close_to_the_right_one_is_told_what_to_change(
    model_type: str, remedy: str, mistake: Any
) -> None:
    adapter = Wrong(model_type, ffn=mistake)
    output = next(one for one in run_checks(adapter, tiny_config(model_type, adapter)) if one.name == "output")
    assert output.detail.endswith(f"; with {remedy} it agrees")


def test_a_description_that_is_not_close_is_not_advised() -> None:
    adapter = Wrong("llama", ffn=lambda f: replace(f, down=renamed(f.down, "s.1.", "s.0.")))
    output = next(one for one in run_checks(adapter, tiny_config("llama", adapter)) if one.name == "output")
    assert output.detail.endswith("of its largest entry")


def test_an_adapter_that_is_right_fails_none() -> None:
    assert failed(Wrong("phi"), "phi") == set()


def test_every_failed_check_is_in_the_assertion() -> None:
    adapter = Wrong("phi", ffn=lambda f: replace(f, up_bias=None))
    with pytest.raises(AssertionError, match=r"(?s)'phi'.*output: model\.layers\.0\.mlp.*zeroing: "):
        check_adapter(adapter, tiny_config("phi"))


def test_options_a_type_does_not_take_can_be_left_out() -> None:
    assert tiny_config("falcon", adapter_for("falcon")).num_hidden_layers == 3


def test_options_that_do_not_go_together_are_reported_with_what_to_do() -> None:
    from mwtool.errors import BadPlugin

    with pytest.raises(BadPlugin, match=r"a tiny model of type 'llama'.*not a multiple.*`tiny`"):
        check_adapter(adapter_for("llama"), tiny_config("llama", num_attention_heads=3, head_dim=None))


def test_a_type_that_transformers_does_not_know_is_reported() -> None:
    from mwtool.errors import BadPlugin

    with pytest.raises(BadPlugin, match="register the type"):
        tiny_config("no_such_type")
