"""A sweep measures what each attack does, beside its controls, and leaves the model as it found it."""

from __future__ import annotations

import io
import math
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console
from sweeps import QUICK, swept
from torch import Tensor, nn
from words import opened, perplexity_of, planted, text_of, with_tokenizer

import mwtool
from mwtool.ablation.continuation import continuations, prompt_ids
from mwtool.ablation.report import ablate_report
from mwtool.ablation.sweep import Sweep, ablate, ablated
from mwtool.errors import BadValue
from mwtool.evaluation.evaluate import prepare
from mwtool.evaluation.tasks import parse_tasks
from mwtool.models.load import Loaded, load
from mwtool.scan.settings import Choice
from mwtool.scan.targets import find_targets
from mwtool.surgery.attack import Attack, edited, parse_mode


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return planted(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_every_type_survives_the_full_sweep_bit_for_bit(tmp_path: Path, model_type: str) -> None:
    """All modes, four ks, controls; of the top rows of layer 1, which a random model has too."""
    loaded = opened(with_tokenizer(tmp_path, tiny.model(model_type, num_hidden_layers=2)))
    before = tiny.digest(loaded.model)
    modes = (Attack("zero"), Attack("retain"), Attack("scale", 0, 0.5), Attack("mean"))
    found = swept(loaded, Sweep(modes, (0, 1, 3), draws=1), Choice(layers=(1,)))
    assert tiny.digest(loaded.model) == before
    assert len(found.runs) == 4 * (1 + 3 + 3)
    values = [run.measured[0].value for run in found.runs]
    assert all(map(math.isfinite, values))
    assert len(set(values)) > 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
    console = Console(width=120, file=io.StringIO())
    console.print(ablate_report(found, width=120))  # every layout has its table


@pytest.mark.parametrize(
    "attack", [Attack("zero", 1), Attack("retain", 1), Attack("retain", 0), Attack("scale", 2, -1.0)], ids=str
)
def test_a_figure_is_the_perplexity_of_the_model_attacked_by_hand(loaded: Loaded, attack: Attack) -> None:
    found = swept(loaded, Sweep((attack.at(0),), (attack.k,), draws=0))
    rows = list(found.runs[0].rows[0])
    weights = [matrix.read(loaded.base) for matrix in found.runs[0].targets[0].ffn.inputs]
    kept = [weight.clone() for weight in weights]
    for weight, old in zip(weights, kept, strict=True):
        if attack.mode == "retain":
            weight.zero_()
            weight[rows] = old[rows]
        else:
            weight[rows] *= attack.factor or 0.0
    expected = perplexity_of(loaded)
    for weight, old in zip(weights, kept, strict=True):
        weight.copy_(old)
    # float32 against float64 from the logits on, and batches that sum in another order
    assert found.runs[0].measured[0].value == pytest.approx(expected, rel=1e-5)
    assert found.baseline[0].value == pytest.approx(perplexity_of(loaded), rel=1e-5)


def test_mean_fixes_rows_at_their_mean_over_the_evaluated_windows(loaded: Loaded) -> None:
    found = swept(loaded, Sweep((Attack("mean"),), (2,), draws=0))
    run, seen, tokenizer = found.runs[0], [], loaded.tokenizer
    assert tokenizer is not None
    assert run.targets[0].ffn.hook is not None
    down = loaded.base.get_submodule(run.targets[0].ffn.hook)
    hook = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).double()))
    perplexity_of(loaded)
    hook.remove()
    rows, mean = list(run.rows[0]), torch.cat(seen).mean(0)

    def fix(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        state = args[0].clone()
        state[..., rows] = mean[rows].float()
        return (state,)

    hook = down.register_forward_pre_hook(fix)
    expected = perplexity_of(loaded)
    hook.remove()
    assert run.measured[0].value == pytest.approx(expected, rel=1e-5)  # float32 sums in another order
    assert run.measured[0].value != found.baseline[0].value


def test_no_rows_is_the_baseline_but_for_retaining_and_has_no_controls(loaded: Loaded) -> None:
    found = swept(loaded, Sweep((Attack("zero"), Attack("retain"), Attack("mean")), (0,)))
    zero, retain, mean = found.runs
    assert zero.measured == mean.measured == found.baseline
    assert retain.measured != found.baseline
    assert found.verdicts == ()


def test_a_planted_row_matters_more_than_its_controls_and_the_verdict_says_so(tmp_path: Path) -> None:
    """Down's column for the row is made large, so that the rest of the model reads it."""
    loaded = planted(tmp_path)
    found = swept(loaded, Sweep((Attack("zero"),), (1,), draws=3))
    (verdict,) = found.verdicts
    assert verdict.beyond is not None
    assert verdict.beyond.low is not None
    assert verdict.beyond.high is not None
    assert len(verdict.random) == 3
    assert "zeroing 1 row multiplies ppl:" in verdict.text
    assert "the row of largest norm, which is the attacked one," in verdict.text
    more = verdict.beyond.low > 1
    less = verdict.beyond.high < 1
    assert ("matter more" in verdict.text, "matter less" in verdict.text) == (more, less)


def test_weights_are_put_back_when_a_task_fails_or_is_interrupted(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny.digest(loaded.model)
    for fault in (KeyboardInterrupt, RuntimeError):

        def fails(_done: int, _total: int, _name: str, fault: type[BaseException] = fault) -> Any:
            def on_batch(done: int, _total: int) -> None:
                if done == 3:  # after the second attack
                    raise fault

            return on_batch

        targets, _ = find_targets(loaded, Choice(), 3)
        with pytest.raises(fault):
            ablate(loaded, targets, parse_tasks([text_of(loaded)]), Sweep(), QUICK, on_run=fails)
        assert tiny.digest(loaded.model) == before


def test_weights_are_put_back_whenever_ctrl_c_comes(loaded: Loaded) -> None:
    """From outside, at random moments of a sweep that attacks by writing and by hooks."""
    before, ((target,),) = tiny.digest(loaded.model), find_targets(loaded, Choice(), 3)[0]
    sweep = Sweep((Attack("zero"), Attack("retain"), Attack("mean")), (0, 1, 3), draws=1)
    moments = torch.rand(40, generator=torch.Generator().manual_seed(0)) * 0.05 + 1e-3

    def press(_number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name == "__del__":  # where Python drops every exception: at the next interval
                return
            frame = frame.f_back
        signal.raise_signal(signal.SIGINT)

    former = signal.signal(signal.SIGALRM, press)
    try:
        for moment in moments.tolist():
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it comes somewhere inside
                signal.setitimer(signal.ITIMER_REAL, moment, 0.5)
                while True:
                    ablate(loaded, [(target,)], parse_tasks([text_of(loaded)]), sweep, QUICK)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert tiny.digest(loaded.model) == before
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def test_continuations_are_greedy_and_those_of_the_attacked_model(loaded: Loaded) -> None:
    ((target,),), _ = find_targets(loaded, Choice(), 2)
    said = continuations(loaded, (target,), Sweep(ks=(1, 2)), prepare(loaded, [], QUICK), "w3 w5", new_tokens=6)
    assert [name for name, _ in said] == ["original", "zero:2", "retain:2"]
    tokenizer: Any = loaded.tokenizer
    for (_, text), attack in zip(said, (Attack(), Attack("zero", 2), Attack("retain", 2)), strict=True):
        ids = [tiny.BOS, *tokenizer("w3 w5", add_special_tokens=False)["input_ids"]]
        with edited(loaded.base, target.ffn, target.indices, attack), torch.no_grad():
            for _ in range(6):
                ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 2:  # the end
                    break
        assert text == tokenizer.decode(ids[3:], skip_special_tokens=True)


def test_a_prompt_ends_where_the_model_has_no_more_positions(tmp_path: Path) -> None:
    loaded = opened(with_tokenizer(tmp_path, tiny.model("gpt2", num_hidden_layers=2)))
    ((target,),), _ = find_targets(loaded, Choice(layers=(1,)), 1)
    with pytest.raises(BadValue, match="the prompt has 64 tokens with bos and the model 64 positions"):
        prompt_ids(loaded, "w1 " * 63)
    assert prompt_ids(loaded, "w1 " * 62).shape == (1, 63)
    said = continuations(loaded, (target,), Sweep(ks=(1,)), [], "w1 " * 62)  # an absolute position more would not exist
    assert [len(text.split()) <= 1 for _, text in said] == [True, True, True]


def test_the_context_manager_does_what_the_sweep_does(loaded: Loaded) -> None:
    massive = mwtool.scan_model(loaded.base, loaded.tokenizer).massive
    assert massive is not None
    windows = prepare(loaded, parse_tasks([text_of(loaded)]), QUICK)[0].windows.ids  # type: ignore[attr-defined] # of a perplexity
    for mode in ("zero", "retain", "scale:0.5", "mean"):
        found = swept(loaded, Sweep((parse_mode(mode),), (3,), draws=0))
        with ablated(loaded.base, massive, mode=mode, k=3, windows=windows):
            assert perplexity_of(loaded) == pytest.approx(found.runs[0].measured[0].value, rel=1e-5)
    for options, message in (
        ({"mode": "mean"}, "mean needs windows=, token ids .* none were given"),
        ({"mode": "mean", "windows": []}, "mean needs windows=, token ids .* none were given"),
        ({"k": -1}, "k is -1; expected 0 or more"),
        ({"k": 99}, "the scan ranked 5; scan with -k 99"),
    ):
        with pytest.raises(BadValue, match=message), mwtool.ablated(loaded.base, massive, **options):
            pass
    with pytest.raises(BadValue, match="no massive weights to attack"), mwtool.ablated(loaded.base, None):
        pass


@pytest.mark.parametrize("on", ["base", "merged"])
def test_rows_of_an_adapter_are_taken_out_of_the_part_that_is_named(tmp_path: Path, on: Any) -> None:
    """Zeroed below the adapter its part remains; zeroed in the sum nothing does."""
    from peft import LoraConfig, get_peft_model

    first = planted(tmp_path / "model")
    wrapped = get_peft_model(first.base, LoraConfig(r=2, target_modules=["up_proj", "gate_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = load(str(tmp_path / "adapter"), on=on)
    ((target,),), _ = find_targets(loaded, Choice(layers=(1,), indices=(17, 4)), 2)
    seen: list[Tensor] = []
    hook = loaded.base.get_submodule(target.ffn.hook or "").register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    before = tiny.digest(loaded.model)
    with edited(loaded.base, target.ffn, target.indices, Attack("zero", 2)), torch.no_grad():
        loaded.model(input_ids=torch.tensor([[1, 5, 6]]))
    hook.remove()
    assert bool(seen[0][..., [17, 4]].any()) == (on == "base")
    assert tiny.digest(loaded.model) == before


def test_what_is_done_to_the_same_rows_is_measured_once(loaded: Loaded) -> None:
    """The planted row is also the one of largest norm."""
    forwards: list[int] = []
    targets, _ = find_targets(loaded, Choice(), 1)
    found = ablate(
        loaded,
        targets,
        parse_tasks([text_of(loaded)]),
        Sweep((Attack("zero"),), (0, 1), draws=2),
        QUICK,
        on_run=lambda _done, _total, _name: lambda done, _of: forwards.append(done),
    )
    runs = 4  # the baseline, the planted row, two random ones
    assert len(forwards) % runs == 0
    assert forwards == list(range(1, len(forwards) + 1))
    assert [run.control for run in found.runs] == [None, None, "random:0", "random:1", "norm"]
    assert found.runs[4].measured == found.runs[1].measured != found.runs[2].measured
