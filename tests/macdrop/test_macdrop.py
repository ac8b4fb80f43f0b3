"""MacDrop drops what Algorithm 1 says, in every layout, and leaves no trace."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from training import IDS, ROWS, digest, frozen, gradients, loss_of, massive, small, with_adapter

from mwtool.errors import BadValue, UnsupportedModel
from mwtool.macdrop.curriculum import Curriculum, Masks, Phase, Schedule, curriculum_of
from mwtool.macdrop.engine import MacDrop

EXPERT = 2


def engine(model: nn.Module, base: Any = None, curriculum: Any = "constant:0.5", **options: Any) -> MacDrop:
    base = base or model
    return MacDrop(model, massive(base), curriculum, **{"steps": 10, **options})


@pytest.fixture(scope="module", params=tiny.ALL_TYPES)
def any_type(request: pytest.FixtureRequest) -> Any:
    return tiny.model(request.param, num_hidden_layers=4).requires_grad_(requires_grad=False)


def test_every_type_drops_its_rows_by_one_mask_and_nothing_else_and_is_bit_identical_after(any_type: Any) -> None:
    expert = EXPERT if tiny.layers_of(any_type)[1].experts is not None else None
    ffn = next(one for one in tiny.layers_of(any_type)[1].ffns if one.expert == expert)
    before, plain = digest(any_type), [place.read(any_type).clone() for place in ffn.inputs]
    macdrop = MacDrop(any_type, massive(any_type, 1, expert), "constant:0.5", steps=10)
    keep = macdrop.mask(3)[0]
    with macdrop.step(3):
        for place, old in zip(ffn.inputs, plain, strict=True):
            now = place.read(any_type)
            assert torch.equal(now[list(ROWS)], old[list(ROWS)] * keep)
            now[list(ROWS)] = old[list(ROWS)]
        assert digest(any_type) == before  # with the rows put back by hand, nothing differs
    assert digest(any_type) == before


def test_a_mask_is_the_formula_and_depends_on_seed_step_and_microbatch_alone() -> None:
    model = frozen()
    macdrop, again = engine(model), engine(model)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    mask = macdrop.mask(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(mask, again.mask(4))
    others = [
        macdrop.mask(5),
        macdrop.mask(4, 1),
        engine(model, curriculum=curriculum_of("constant:0.5", seed=1)).mask(4),
    ]
    assert not any(torch.equal(mask, other) for other in others)
    assert mask.shape == (1, 5, model.config.hidden_size)


@given(st.floats(0.01, 0.99), st.integers(1, 1000))
def test_the_dropped_share_is_p(p: float, t: int) -> None:
    macdrop = engine(SMALL, curriculum=curriculum_of(Schedule("constant", p), scope="all"), steps=1000)
    mask = macdrop.mask(t)
    sigma = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs((~mask).double().mean() - p) < 6 * sigma  # one in 10^9 by chance


SMALL = frozen()


def test_p_1_drops_all_and_p_0_touches_nothing() -> None:
    model = frozen()
    up = tiny.layers_of(model)[1].ffns[0].up.read(model)
    with engine(model, curriculum="constant:1").step(1):
        assert not up[list(ROWS)].any()
    version = model.model.layers[1].mlp.up_proj.weight._version
    with engine(model, curriculum="none").step(1) as macdrop:
        assert macdrop.p == 0
        assert model.model.layers[1].mlp.up_proj.weight._version == version


@pytest.mark.parametrize("masks", ["shared", "separate"])
def test_gate_and_up_share_a_mask_unless_asked_otherwise(masks: Masks) -> None:
    model = frozen()
    mlp = model.model.layers[1].mlp
    with engine(model, curriculum=curriculum_of("constant:0.5", masks=masks)).step(1):
        same = torch.equal(mlp.up_proj.weight[list(ROWS)] == 0, mlp.gate_proj.weight[list(ROWS)] == 0)
    assert same == (masks == "shared")


@pytest.mark.parametrize("resample", ["step", "microbatch"])
def test_a_mask_holds_for_the_step_unless_resampled_by_microbatch(resample: Any) -> None:
    model = frozen()
    weight = model.model.layers[1].mlp.up_proj.weight
    with engine(model, curriculum=curriculum_of("constant:0.5", resample=resample)).step(1) as macdrop:
        first = weight.clone()
        macdrop.next_microbatch()
        assert torch.equal(first, weight) == (resample == "step")
        assert torch.equal(weight[list(ROWS)] != 0, macdrop.mask(1, 1 if resample == "microbatch" else 0)[0])


@pytest.mark.parametrize(("scope", "count"), [("massive", 5), ("others", 59), ("all", 64)])
def test_the_scope_chooses_the_rows(scope: Any, count: int) -> None:
    model = frozen()
    weight = model.model.layers[1].mlp.up_proj.weight
    with engine(model, curriculum=curriculum_of("constant:1", scope=scope)).step(1) as macdrop:
        assert len(macdrop.rows) == count
        assert [row for row in range(64) if not weight[row].any()] == sorted(macdrop.rows)


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_weights_are_restored_when_a_step_fails(fault: type[BaseException]) -> None:
    model = frozen()
    before = digest(model)
    macdrop = engine(model)
    with pytest.raises(fault), macdrop.step(1):
        raise fault
    assert digest(model) == before
    assert macdrop.p == 0.5


@pytest.mark.parametrize("times", [1, 2, 5])
def test_interrupts_while_restoring_leave_nothing_half_done(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    model = frozen()
    before, writes, original = digest(model), 0, Tensor.__setitem__

    def interrupted(self: Tensor, index: Any, value: Any) -> None:
        nonlocal writes
        writes += 1
        if 3 <= writes < 3 + times:  # two writes drop; those after them restore
            signal.raise_signal(signal.SIGINT)
        original(self, index, value)

    monkeypatch.setattr(Tensor, "__setitem__", interrupted)
    with pytest.raises(KeyboardInterrupt), engine(model).step(1):
        pass
    assert digest(model) == before


@pytest.mark.parametrize("dora", [False, True])
def test_ctrl_c_at_any_line_leaves_no_trace(dora: bool) -> None:  # noqa: FBT001 - a parameter
    """One interrupt before each line of ours in turn, as often as there are lines."""
    base = small()
    model = with_adapter(base, dora=dora, target_modules=["up_proj", "gate_proj"], layers_to_transform=[1])
    before, macdrop, lines = digest(model), engine(model, base), 0
    while _interrupted_at(lines, macdrop):
        assert digest(model) == before, f"at line {lines}"
        assert not any({"merge", "get_weight_norm"} & set(vars(module)) for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())
        assert torch.is_grad_enabled()
        lines += 1
    assert lines > 100
    with macdrop.step(1):
        assert digest(model) != before
    assert digest(model) == before


def _interrupted_at(number: int, macdrop: MacDrop) -> bool:
    """Runs a step in which Ctrl-C comes before line `number` of ours; whether there was such a line."""
    seen = 0

    def trace(frame: Any, event: str, _arg: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.endswith(
            ("macdrop/masked_rows.py", "macdrop/engine.py", "macdrop/fsdp.py", "mwtool/interrupts.py")
        ):
            return None
        if event == "line":
            seen += 1
            if seen == number + 1:
                raise KeyboardInterrupt
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        with macdrop.step(1):
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(former)
    return False


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "mixtral"])
def test_a_state_dict_taken_inside_a_step_holds_the_pretrained_weights(model_type: str) -> None:
    model = frozen(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = massive(model, 1, EXPERT if model_type == "mixtral" else None)
    with MacDrop(model, found, "constant:0.9", steps=3).step(1):
        inside = model.state_dict()
        assert any((p == 0).sum() > 50 for p in model.parameters())  # dropped indeed
    assert all(torch.equal(inside[name], before[name]) for name in before)
    assert not any(module._state_dict_hooks for module in model.modules())


@pytest.mark.parametrize("dora", [False, True])
def test_training_is_algorithm_1_written_out_by_hand(dora: bool) -> None:  # noqa: FBT001 - a parameter
    """Five steps of two micro-batches with AdamW, bit for bit."""

    def trained(by_hand: bool) -> list[Tensor]:  # noqa: FBT001 - which of the two
        base = small()
        model = with_adapter(base, dora=dora)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        macdrop = engine(model, base, "step:0.8", steps=5)
        mlp = base.model.layers[1].mlp
        weights = [mlp.up_proj.base_layer.weight, mlp.gate_proj.base_layer.weight]
        kept = [weight[list(ROWS)].clone() for weight in weights]
        for t in range(1, 6):
            if by_hand:
                for weight, rows in zip(weights, kept, strict=True):
                    weight.data[list(ROWS)] = rows * macdrop.mask(t)[0]
            else:
                macdrop.begin(t)
            for batch in (IDS[:1], IDS[1:]):
                (loss_of(model, batch) / 2).backward()
            if by_hand:
                for weight, rows in zip(weights, kept, strict=True):
                    weight.data[list(ROWS)] = rows
            else:
                macdrop.restore()
            optimizer.step()
            optimizer.zero_grad()
        return parameters

    assert all(torch.equal(a, b) for a, b in zip(trained(by_hand=True), trained(by_hand=False), strict=True))


# transformers renamed it; the former name is the one that every supported version has
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_exact(dora: bool, reentrant: bool) -> None:  # noqa: FBT001 - parameters
    base = small()
    model = with_adapter(base, dora=dora)
    macdrop = engine(model, base, "constant:0.8")
    with macdrop.step(1):
        plain = gradients(model)
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with macdrop.step(1):
        recomputed = gradients(model)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert any(value.any() for value in plain.values())


def output_of(model: nn.Module, module: nn.Module) -> Tensor:
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, output: seen.append(output))
    loss_of(model).backward()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_dora_row_dropped_whole_gives_no_nan(model_type: str, trained: bool) -> None:  # noqa: FBT001 - a parameter
    """p = 1 and B = 0 is 0/0 in DoRA; the row then gives what the adapter alone gives."""
    base = small(model_type)
    model = with_adapter(base, dora=True, trained=trained, fan_in_fan_out=model_type == "gpt2")
    with engine(model, base, "constant:1").step(1):
        found = gradients(model)
        assert loss_of(model).isfinite()
    assert all(value.isfinite().all() for value in found.values())
    assert not any("get_weight_norm" in vars(module) for module in model.modules())


def test_without_the_guard_a_dora_row_dropped_whole_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mwtool.macdrop.masked_rows.WrittenRows._guard_norm", lambda *_: None)
    base = small()
    model = with_adapter(base, dora=True, trained=False)
    with engine(model, base, "constant:1").step(1):
        assert loss_of(model).isnan()


def test_dora_rescales_a_masked_row_by_its_norm() -> None:
    """|W m| is about sqrt(1-p) |W|, so the row's output is that of the mask over sqrt(1-p)."""
    base = small(hidden_size=256, head_dim=64)
    model = with_adapter(base, dora=True, trained=False)
    up = base.model.layers[1].mlp.up_proj
    plain = up.base_layer.weight[list(ROWS)].clone()
    macdrop = engine(model, base, "constant:0.75")
    keep = macdrop.mask(1)[0]
    inputs: list[Tensor] = []
    handle = up.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with macdrop.step(1):
        output = output_of(model, up)[..., list(ROWS)]
    handle.remove()
    masked = inputs[0] @ (plain * keep).T
    scale = plain.norm(dim=1) / (plain * keep).norm(dim=1)
    torch.testing.assert_close(output, masked * scale, rtol=1e-4, atol=1e-5)  # float32, other order of sums
    assert scale.mean() == pytest.approx(2, rel=0.1)


def test_experts_wrapped_by_peft_are_dropped_from() -> None:
    base = small("mixtral")
    model = with_adapter(
        base, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    before = digest(model)
    macdrop = MacDrop(model, massive(base, 1, EXPERT), "constant:1", steps=3)
    ffn = tiny.layers_of(base)[1].ffns[EXPERT]
    with macdrop.step(1):
        loss_of(model).backward()
        assert not ffn.up.read(base)[list(ROWS)].any()
    assert digest(model) == before


def test_rows_that_are_trained_are_refused() -> None:
    with pytest.raises(BadValue, match=r"model\.layers\.1\.mlp\.up_proj\.weight is trainable"):
        engine(small())
    base = small()
    model = with_adapter(base, target_modules=["q_proj"], modules_to_save=["up_proj"])
    with pytest.raises(BadValue, match="is trainable"):
        engine(model, base)


def test_zero_3_and_offloaded_weights_are_refused_by_name() -> None:
    model = frozen()
    found, weight = massive(model), model.model.layers[1].mlp.up_proj.weight
    weight.ds_id = 1  # as DeepSpeed marks a partitioned parameter
    with pytest.raises(UnsupportedModel, match="ZeRO-3"):
        MacDrop(model, found, "step:0.8", steps=3)
    del weight.ds_id
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(UnsupportedModel, match="offloaded"):
        MacDrop(model, found, "step:0.8", steps=3)


def test_what_the_run_cannot_have_is_refused_before_it_begins() -> None:
    model = frozen()
    with pytest.raises(BadValue, match="no massive weights"):
        MacDrop(model, None, "step:0.8", steps=3)
    with pytest.raises(BadValue, match="k = 6 rows and the scan ranked 5"):
        engine(model, curriculum=curriculum_of("step:0.8", k=6))
    elsewhere = replace(massive(model), indices=(1, 2, 3, 4, 64))
    with pytest.raises(BadValue, match=r"model\.layers\.1\.mlp has rows 0 to 63"):
        MacDrop(model, elsewhere, "step:0.8", steps=3)
    phases = Curriculum(phases=(Phase(Schedule(), steps=20), Phase(Schedule("step", 0.8))))
    with pytest.raises(BadValue, match="do not fit into 10 steps"):
        engine(model, curriculum=phases)


def test_the_copy_of_the_rows_is_all_the_memory_it_takes() -> None:
    model = frozen(dtype=torch.bfloat16)
    macdrop = engine(model)
    assert macdrop.kept_bytes == 2 * 5 * model.config.hidden_size * 2
    assert str(macdrop) == "MacDrop constant:0.5 on model.layers.1.mlp, 5 rows (7, 3, 12, 8, 1), by weights"
