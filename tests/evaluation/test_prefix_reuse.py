"""Attacks that run only the layers they can change give what whole forwards give, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from mwtool.evaluation.perplexity import perplexity
from mwtool.evaluation.prefix_reuse import Recording, Variant, is_reusable, perplexities
from mwtool.evaluation.windows import Windows
from mwtool.surgery.attack import Attack, Edit, edited_together

DEPTH = 4


def cut(count: int = 3, length: int = 12) -> Windows:
    """Windows of random tokens, the last one shorter."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 20, (length,), generator=generator) for _ in range(count)]
    ids[-1] = ids[-1][: length - 3]
    scored = tuple(len(one) - 1 for one in ids)
    return Windows(
        ids=tuple(ids),
        scored=scored,
        sample=tuple(range(count)),
        units=scored,
        protocol="bos",
        metric="perplexity",
        length=length,
        bos=1,
    )


def modules(model: Any) -> list[nn.Module]:
    return [model.get_submodule(layer.path) for layer in tiny.layers_of(model)]


def attack(model: Any, layers: tuple[int, ...]) -> Variant:
    edits = [Edit(tiny.layers_of(model)[layer].ffns[0], (1, 4)) for layer in layers]
    return Variant(min(layers), partial(edited_together, model, edits, Attack("zero", 2)))


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_every_type_gives_the_perplexity_of_a_whole_forward_bit_for_bit(model_type: str) -> None:
    """No installed type needs the fallback, and each attack's figure is that of `perplexity` under the same attack."""
    model: Any = tiny.model(model_type, num_hidden_layers=DEPTH)
    before = tiny.digest(model)
    assert is_reusable(model, modules(model), torch.arange(3, 11)[None], set(range(1, DEPTH)))
    variants = [attack(model, layers) for layers in ((0,), (1,), (2,), (3,), (1, 3))]
    found = perplexities(model, modules(model), cut(), variants, batch_size=2)
    for variant, one in zip((None, *variants), found, strict=True):
        with nullcontext() if variant is None else variant.apply():
            alone = perplexity(model, cut(), batch_size=2)
        assert (one.nll, one.value, one.counts, one.notes) == (alone.nll, alone.value, alone.counts, alone.notes)
    assert tiny.digest(model) == before


@pytest.mark.parametrize("model_type", ["llama", "gpt_neo", "mixtral"])
def test_layers_below_an_attack_compute_nothing(model_type: str) -> None:
    model: Any = tiny.model(model_type, num_hidden_layers=DEPTH)
    inner = next(iter(modules(model)[1].children()))
    calls: list[None] = []
    recording, ids = Recording(modules(model), {1, 2}), torch.arange(3, 11)[None]
    with torch.inference_mode():
        with recording.capturing():
            model(input_ids=ids, use_cache=False)
        handle = inner.register_forward_hook(lambda *_: calls.append(None))
        for layer, expected in ((1, 1), (2, 0)):
            calls.clear()
            with recording.replayed(layer):
                model(input_ids=ids, use_cache=False)
            assert len(calls) == expected
        handle.remove()


class Sharing(nn.Module):
    """A layer that relies on what the first layer left behind, as layers that share key-value states do."""

    def __init__(self, layer: nn.Module, left: dict[str, torch.Tensor], *, first: bool) -> None:
        super().__init__()
        self.layer, self.left, self.first = layer, left, first

    def forward(self, *args: Any, **options: Any) -> Any:
        if self.first:
            self.left["state"] = args[0]
        else:
            args = (args[0] + 0.5 * self.left["state"], *args[1:])
        return self.layer(*args, **options)


def test_a_model_that_passes_more_between_its_layers_runs_whole_and_says_so() -> None:
    model: Any = tiny.model("llama", num_hidden_layers=3)
    left: dict[str, Any] = {}
    for index, layer in enumerate(list(model.model.layers)):
        model.model.layers[index] = Sharing(layer, left, first=index == 0)
    layers = list(model.model.layers)
    layers[2].register_forward_hook(lambda *_: left.clear())
    assert not is_reusable(model, layers, torch.arange(3, 11)[None], {1, 2})
    ffn = tiny.layers_of(tiny.model("llama", num_hidden_layers=3))[2].ffns[0]

    def change() -> Any:
        return scaled(layers[2].layer.mlp.up_proj.weight)

    assert ffn.module.endswith("mlp")
    plain, attacked = perplexities(model, layers, cut(), [Variant(2, change)])
    with change():
        alone = perplexity(model, cut())
    assert attacked.nll == alone.nll != plain.nll
    assert plain.notes == ("LlamaForCausalLM passes more between its layers than they return: attacks run it whole",)


class scaled:  # noqa: N801 - used as a context manager
    """A weight at half its value inside the block."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.kept = weight, weight.detach().clone()

    def __enter__(self) -> None:
        self.weight.data.mul_(0.5)

    def __exit__(self, *_: object) -> None:
        self.weight.data.copy_(self.kept)


def test_a_fault_inside_an_attack_leaves_model_and_layers_as_they_were() -> None:
    model: Any = tiny.model("llama", num_hidden_layers=DEPTH)
    before = tiny.digest(model)

    def fails(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perplexities(model, modules(model), cut(), [attack(model, (2,)), attack(model, (3,))], on_batch=fails)
    assert tiny.digest(model) == before
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in modules(model))


def test_progress_counts_every_forward() -> None:
    model: Any = tiny.model("llama", num_hidden_layers=DEPTH)
    seen: list[tuple[int, int]] = []
    perplexities(
        model, modules(model), cut(), [attack(model, (1,))], batch_size=1, on_batch=lambda *at: seen.append(at)
    )
    assert seen == [(done, 6) for done in range(1, 7)]
