"""Rows are attacked as asked and put back bit for bit, in every layout, however the block ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from contextlib import nullcontext as nothing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from mwtool.architecture.layout import FFN
from mwtool.architecture.reference import recompute
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.surgery.attack import Attack, edited, parse_attack, parse_mode
from mwtool.surgery.hooks import averaging

IDS = torch.tensor([[tiny.BOS, 5, 9, 3, 17, 22, 40, 8]])
ATTACKS = [Attack("zero", 2), Attack("retain", 2), Attack("scale", 2, 0.5), Attack("mean", 2), Attack("retain", 0)]
TOLERANCE = 1e-5
"""Of the largest logit, in float32: products summed in another order."""


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def networks(model: PreTrainedModel) -> Iterator[FFN]:
    """One of each kind in the layer 1: dense, routed, shared."""
    seen = set()
    for ffn in tiny.layers_of(model)[1].ffns:
        kind = (ffn.expert is None, ffn.hook is None)
        if kind not in seen:
            seen.add(kind)
            yield ffn


@pytest.fixture(scope="module", params=tiny.ALL_TYPES)
def made(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.model(request.param, num_hidden_layers=2)


def with_means(model: PreTrainedModel, ffn: FFN) -> Tensor:
    with averaging(model, ffn) as average:
        logits(model)
    return average.values if average.values is not None else torch.zeros(ffn.width(model), dtype=torch.float64)


def test_every_type_is_bit_identical_after_each_mode_and_after_errors_and_interrupts(made: PreTrainedModel) -> None:
    before = tiny.digest(made)
    for ffn in networks(made):
        means = with_means(made, ffn)
        for attack in ATTACKS:
            rows = [1, 4][: attack.k]
            with edited(made, ffn, rows, attack, means=means):
                changed = tiny.digest(made)
            assert tiny.digest(made) == before
            assert (changed != before) == (attack.mode != "mean" or ffn.expert is not None)
            for fault in (ValueError, KeyboardInterrupt):
                with pytest.raises(fault), edited(made, ffn, rows, attack, means=means):
                    raise fault
                assert tiny.digest(made) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())


def test_rows_have_their_new_values_and_no_other_entry_changes(made: PreTrainedModel) -> None:
    """For every network of layer 1 the state by its formula, before and inside the block, on the same input."""
    x = torch.randn(16, made.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0))
    for ffn in networks(made):
        plain = recompute(ffn, made, x)[0]
        rest = [row for row in range(plain.shape[1]) if row not in (1, 4)]
        with edited(made, ffn, [1, 4], Attack("zero", 2)):
            zeroed = recompute(ffn, made, x)[0]
        with edited(made, ffn, [1, 4], Attack("retain", 2)):
            retained = recompute(ffn, made, x)[0]
        assert not zeroed[:, [1, 4]].any()
        assert not retained[:, rest].any()
        # another input to the kernel may be summed in another order
        torch.testing.assert_close(zeroed[:, rest], plain[:, rest], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(retained[:, [1, 4]], plain[:, [1, 4]], rtol=1e-6, atol=1e-6)


def test_fixing_at_the_mean_is_what_replacing_the_state_by_hand_gives(made: PreTrainedModel) -> None:
    """Rows 1 and 4 of W_up zeroed, and what their means give through W_down added to the output, by plain code."""
    for ffn in networks(made):
        means = with_means(made, ffn)
        with edited(made, ffn, [1, 4], Attack("mean", 2), means=means):
            found = logits(made)
        with edited(made, ffn, [1, 4], Attack("zero", 2)), added_by_hand(made, ffn, means):
            expected = logits(made)
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
        if means[[1, 4]].any():
            assert not torch.equal(found, logits(made))


class added_by_hand:  # noqa: N801 - reads as a function
    """W_down's columns 1 and 4 times the means, added to the network's output."""

    def __init__(self, model: PreTrainedModel, ffn: FFN, means: Tensor) -> None:
        extra = ffn.down.read(model)[:, [1, 4]] @ means[[1, 4]].float()

        def dense(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output + extra

        def routed(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output.clone()
            for token, chosen in enumerate(args[1].tolist()):
                for place, expert in enumerate(chosen):
                    if expert == ffn.expert:
                        output[token] += args[2][token, place] * extra
            return output

        self.module = model.get_submodule(ffn.hook or ffn.module)
        self.hook = dense if ffn.hook else routed

    def __enter__(self) -> None:
        self.handle = self.module.register_forward_hook(self.hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_an_attack_on_no_rows_changes_nothing_but_retaining_none_silences_the_network() -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    ffn, plain = tiny.layers_of(model)[1].ffns[0], logits(model)
    for mode in (Attack("zero"), Attack("scale", 0, 3.0), Attack("mean"), Attack()):
        assert mode.idle
        with edited(model, ffn, [], mode):
            assert torch.equal(logits(model), plain)
    assert not Attack("retain").idle
    silenced = model.get_submodule(ffn.module).register_forward_hook(lambda _m, _a, output: torch.zeros_like(output))
    expected = logits(model)
    silenced.remove()
    with edited(model, ffn, [], Attack("retain")):
        assert torch.equal(logits(model), expected)


def test_interrupts_while_restoring_leave_nothing_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    before, ffn = tiny.digest(model), tiny.layers_of(model)[1].ffns[0]
    writes = count = 0
    original = Tensor.__setitem__

    def interrupted(self: Tensor, index: Any, value: Any) -> None:
        nonlocal writes
        writes += 1
        if 3 <= writes < 3 + count:  # two writes attack; those after them restore
            signal.raise_signal(signal.SIGINT)
        original(self, index, value)

    monkeypatch.setattr(Tensor, "__setitem__", interrupted)
    for times in (1, 2, 5):
        count = times
        writes = 0
        with pytest.raises(KeyboardInterrupt), edited(model, ffn, [1, 4], Attack("zero", 2)):
            pass
        assert tiny.digest(model) == before


def test_biases_are_attacked_with_their_rows() -> None:
    model = tiny.model("phi", num_hidden_layers=4)
    ffn = tiny.layers_of(model)[1].ffns[0]
    assert ffn.up_bias is not None
    bias = ffn.up_bias.read(model)
    plain = bias.clone()
    with edited(model, ffn, [3], Attack("zero", 1)):
        assert bias[3] == 0
        assert torch.equal(bias[4:], plain[4:])
    with edited(model, ffn, [3], Attack("scale", 1, -2.0)):
        assert bias[3] == -2 * plain[3]


def test_an_expert_is_attacked_within_itself() -> None:
    model = tiny.model("mixtral", num_hidden_layers=4)
    layer = tiny.layers_of(model)[1]
    others = [
        place.read(model).clone() for ffn in layer.ffns if ffn.expert != 2 for place in (ffn.up, ffn.gate, ffn.down)
    ]
    chosen = layer.ffns[2]
    with edited(model, chosen, [0, 1], Attack("retain", 2)):
        assert not chosen.up.read(model)[2:].any()
        now = [place.read(model) for ffn in layer.ffns if ffn.expert != 2 for place in (ffn.up, ffn.gate, ffn.down)]
        assert all(torch.equal(a, b) for a, b in zip(now, others, strict=True))


def test_rows_out_of_range_are_refused_by_number() -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    ffn = tiny.layers_of(model)[1].ffns[0]
    for row in (64, -1):
        with pytest.raises(BadValue, match=f"row {row} does not exist; the FFN has rows 0 to 63"):
            edited(model, ffn, [row], Attack("zero", 1)).__enter__()


def test_mean_without_means_says_what_is_needed() -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    with pytest.raises(BadValue, match="needs the mean values of the rows"):
        edited(model, tiny.layers_of(model)[1].ffns[0], [1], Attack("mean", 1)).__enter__()


def test_the_average_is_the_mean_over_all_tokens_of_all_forwards() -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    ffn, seen = tiny.layers_of(model)[1].ffns[0], []
    assert ffn.hook is not None
    hook = model.get_submodule(ffn.hook).register_forward_pre_hook(lambda _m, args: seen.append(args[0].double()))
    with averaging(model, ffn) as average:
        logits(model)
        logits(model, IDS[:, :3].repeat(2, 1))
    hook.remove()
    expected = torch.cat([z.reshape(-1, z.shape[-1]) for z in seen]).mean(0)
    assert average.count == 8 + 6
    assert average.values is not None
    torch.testing.assert_close(average.values, expected, rtol=1e-12, atol=1e-12)  # float64 sums in another order


@pytest.mark.parametrize("mode", ["zero", "retain", "scale"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_rows_of_an_offloaded_layer_give_bit_for_bit_what_they_give_in_memory(
    tmp_path: Path, model_type: str, mode: Any, place: str
) -> None:
    from accelerate import cpu_offload, disk_offload

    model, away = tiny.model(model_type, num_hidden_layers=2), tiny.model(model_type, num_hidden_layers=2)
    if place == "disk":
        disk_offload(away, tmp_path, execution_device=torch.device("cpu"))
    else:
        cpu_offload(away, execution_device=torch.device("cpu"))
    ffn, attack = tiny.layers_of(model)[1].ffns[0], Attack(mode, 2, 0.5 if mode == "scale" else None)
    plain = logits(away)
    assert torch.equal(plain, logits(model))
    with edited(model, ffn, [1, 4], attack), edited(away, ffn, [1, 4], attack):
        attacked = logits(away)
        assert torch.equal(attacked, logits(model))
        assert not torch.equal(attacked, plain)
        assert torch.equal(logits(away), attacked)
    assert torch.equal(logits(away), plain)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_that_cannot_be_read_are_refused_before_their_states_are_averaged(
    tmp_path: Path, model_type: str
) -> None:
    """They are computed from the weights; what a module receives is seen wherever its weights are."""
    from accelerate import disk_offload

    model = tiny.model(model_type, num_hidden_layers=2)
    ffn = tiny.layers_of(model)[1].ffns[0]
    weights = model.get_submodule(ffn.module).down_proj
    weights.data = weights.data.to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedModel, match="holds packed experts, whose values cannot be fixed at their mean"):
        averaging(model, ffn).__enter__()
    weights.data = weights.data.float()
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=r"model.layers.1.mlp.experts is offloaded.* without offloading"):
        averaging(model, ffn).__enter__()


@pytest.mark.parametrize(
    ("model_type", "targets"), [("llama", ["gate_proj", "up_proj"]), ("gpt2", ["c_fc"]), ("phi3", ["gate_up_proj"])]
)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_a_dora_row_without_norm_gives_zero_and_never_nan(model_type: str, targets: list[str], trained: bool) -> None:  # noqa: FBT001 - a parameter
    """Fresh, B is zero and the norm of a zeroed row with it: 0/0 in PEFT. Trained, the adapter's part remains."""
    from peft import LoraConfig, get_peft_model

    model = tiny.model(model_type, num_hidden_layers=4)
    fan = model_type == "gpt2"
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, use_dora=True, fan_in_fan_out=fan)).eval()
    if trained:
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    base, before = wrapped.get_base_model(), tiny.digest(wrapped)
    ffn = tiny.layers_of(base)[1].ffns[0]
    seen: list[Tensor] = []
    hook = base.get_submodule(ffn.hook or "").register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    for attack in (Attack("zero", 2), Attack("retain", 2)):
        rows = [1, 4]
        attacked = rows if attack.mode == "zero" else [row for row in range(ffn.width(base)) if row not in rows]
        with edited(base, ffn, rows, attack):
            assert logits(wrapped).isfinite().all()
        assert seen[-1][..., attacked].any() == trained
        assert tiny.digest(wrapped) == before
    hook.remove()


@pytest.mark.parametrize("model_type", ["llama", "phi", "phi3"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_rows_give_exactly_what_the_attack_leaves_of_them(tmp_path: Path, model_type: str, bits: int) -> None:
    """Layer 1 receives what it always does, so its modules' outputs can be compared to the last bit."""
    model = quantized(tmp_path, model_type, bits)
    ffn, plain, means = tiny.layers_of(model)[1].ffns[0], logits(model), None
    for attack in ATTACKS:
        means = with_means(model, ffn)
        rows = [1, 4][: attack.k]
        chosen = rows if attack.mode != "retain" else [row for row in range(64) if row not in rows]
        before, after = (
            outputs(model, ffn, nothing()),
            outputs(model, ffn, edited(model, ffn, rows, attack, means=means)),
        )
        for place in ffn.inputs if attack.mode != "mean" else ():
            state = before[place.param]  # gate and up may be one module's
            entries = place.rows(chosen, (state.shape[-1], 64))[1]
            state[..., entries] *= attack.factor or 0.0
        assert all(torch.equal(after[name], state) for name, state in before.items())
        with edited(model, ffn, rows, attack, means=means):
            assert not torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)


def test_4_bit_stored_as_floats_is_not_written_to(tmp_path: Path) -> None:
    model = quantized(tmp_path, "llama", 4, "bfloat16")  # not run before: the CPU's kernel stores it as integers
    ffn, weight = tiny.layers_of(model)[1].ffns[0], model.get_parameter("model.layers.1.mlp.up_proj.weight")
    before = weight.data.view(torch.uint8).clone()
    with edited(model, ffn, [1, 4], Attack("zero", 2)):
        assert torch.equal(weight.data.view(torch.uint8), before)
        given = outputs(model, ffn, nothing())[ffn.up.param]
    assert not given[..., [1, 4]].any()
    assert given[..., [0, 2, 3]].all()


def outputs(model: PreTrainedModel, ffn: FFN, block: AbstractContextManager[None]) -> dict[str, Tensor]:
    """What the modules of up and gate give inside the block; hooked after it, so that its hooks ran before."""
    seen: dict[str, Tensor] = {}
    with block, ExitStack() as hooks:
        for place in ffn.inputs:
            module = model.get_submodule(place.param.rpartition(".")[0])
            keep = partial(lambda name, _m, _a, output: seen.update({name: output.clone()}), place.param)
            hooks.callback(module.register_forward_hook(keep).remove)
        logits(model)
    return seen


def quantized(folder: Path, model_type: str, bits: int, storage: str | None = None) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes", reason="an optional library")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    tiny.saved(folder, tiny.model(model_type, num_hidden_layers=4, hidden_size=64, head_dim=16))  # a block is 64 wide
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options)
    assert loaded.get_submodule("model.layers.1.mlp").get_parameter(
        "down_proj.weight" if model_type != "phi" else "fc2.weight"
    ).dtype in ((torch.uint8, torch.int8) if storage is None else (getattr(torch, storage),))
    return loaded.eval()


def test_packed_experts_are_refused_with_the_reason() -> None:
    model = tiny.model("mixtral", num_hidden_layers=4)
    ffn = tiny.layers_of(model)[1].ffns[0]
    experts = model.get_submodule(ffn.module)
    packed = experts.gate_up_proj.data.to(torch.float8_e4m3fn)
    experts.gate_up_proj = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(
        UnsupportedModel, match=r"holds packed torch.float8_e4m3fn weights .* load the model unquantized"
    ):
        edited(model, ffn, [1], Attack("zero", 1)).__enter__()


def test_experts_under_an_adapter_of_their_own_are_attacked_but_not_fixed() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny.model("mixtral", num_hidden_layers=2)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]))
    base, before = wrapped.get_base_model(), tiny.digest(wrapped)
    ffn = tiny.layers_of(base)[1].ffns[0]
    rows = ffn.up.read(base)
    with edited(base, ffn, [1, 4], Attack("zero", 2)):
        assert not rows[[1, 4]].any()
    assert tiny.digest(wrapped) == before
    with pytest.raises(UnsupportedModel, match="whose contribution a mean cannot replace; use --on merged"):
        edited(base, ffn, [1, 4], Attack("mean", 2), means=torch.zeros(64)).__enter__()


@given(st.sampled_from(["zero", "retain", "mean"]), st.integers(0, 10**6))
def test_an_attack_is_parsed_from_what_it_is_printed_as(mode: Any, k: int) -> None:
    attack = Attack(mode, k)
    assert parse_attack(str(attack)) == attack
    assert parse_mode(attack.name) == replace(attack, k=0)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 99))
def test_a_factor_is_read_as_python_reads_it(factor: float, k: int) -> None:
    assert parse_attack(f"scale:{factor!r}:{k}") == Attack("scale", k, factor)


@given(st.text(max_size=12))
def test_no_text_raises_anything_but_bad_value(text: str) -> None:
    parsers: list[Callable[[str], Attack]] = [parse_attack, parse_mode]
    for parse in parsers:
        with suppress(BadValue):
            assert parse(text).mode == text.partition(":")[0]


@pytest.mark.parametrize(
    "text", ["zero", "zero:-1", "zero:1.5", "scale:1", "scale:nan:3", "scale:inf:3", "drop:3", "zero:3:3", ""]
)
def test_malformed_attacks_are_refused(text: str) -> None:
    with pytest.raises(BadValue, match="expected none, zero:K"):
        parse_attack(text)
