"""A sweep measures what each attack does, beside its controls, and leaves the model as it found it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import mwtool
from mwtool.ablate import Ablation, Run, Sweep, ablate, ablated
from mwtool.ablate_document import ablate_document
from mwtool.ablate_report import ablate_report
from mwtool.continuation import continuations, prompt_ids
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.evaluate import prepare
from mwtool.load import Loaded, load
from mwtool.measured import Measured, Options
from mwtool.plots import _curves, plot_ablation
from mwtool.scan_document import scan_document
from mwtool.surgery import Attack, edited, parse_mode
from mwtool.targets import Choice, Target, find_targets, norm_rows, random_rows
from mwtool.tasks import parse_tasks
from mwtool.verdict import judge, paired_ratio, student_t

WORDS = [f"w{number}" for number in range(40)]
QUICK = Options(window=16)


def with_tokenizer(folder: Path, model: PreTrainedModel) -> Path:
    """The model saved with a tokenizer of 40 words, and a text of them."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    order = torch.randint(40, (95,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(WORDS[index] for index in order))
    return tiny.saved(folder, model)


def opened(folder: Path, model: PreTrainedModel) -> Loaded:
    """Loaded with this tokenizer; AutoTokenizer takes some types' own class, whatever the folder says."""
    loaded = load(str(with_tokenizer(folder, model)))
    return replace(loaded, tokenizer=PreTrainedTokenizerFast.from_pretrained(folder))


def planted(folder: Path, model_type: str = "llama", **changes: Any) -> Loaded:
    model = tiny.model(model_type, **changes)
    tiny.plant(model)
    return opened(folder, model)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return planted(tmp_path_factory.mktemp("planted"))


def text_of(loaded: Loaded) -> str:
    return f"ppl:{loaded.source.folder / 'text.txt'}"


def digest(model: nn.Module) -> str:
    state = hashlib.sha256()
    for tensor in model.state_dict().values():
        state.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def perplexity_of(loaded: Loaded) -> float:
    """By plain transformers code in float64: windows of bos and 15 tokens, one by one."""
    tokenizer: Any = loaded.tokenizer
    ids = tokenizer((loaded.source.folder / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
    total = count = 0.0
    for start in range(0, len(ids), 15):
        window = torch.tensor([[tiny.BOS, *ids[start : start + 15]]])
        with torch.no_grad():
            logits = loaded.model(input_ids=window).logits[0].double().log_softmax(-1)
        total -= float(logits[:-1].gather(1, window[0, 1:, None]).sum())
        count += window.shape[1] - 1
    return math.exp(total / count)


def swept(loaded: Loaded, sweep: Sweep, choice: Choice | None = None) -> Ablation:
    targets, _ = find_targets(loaded, choice or Choice(), max(sweep.ks))
    return ablate(loaded, targets, parse_tasks([text_of(loaded)]), sweep, QUICK)


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_every_type_survives_the_full_sweep_bit_for_bit(tmp_path: Path, model_type: str) -> None:
    """All modes, four ks, controls; of the top rows of layer 1, which a random model has too."""
    loaded = opened(tmp_path, tiny.model(model_type, num_hidden_layers=2))
    before = digest(loaded.model)
    modes = (Attack("zero"), Attack("retain"), Attack("scale", 0, 0.5), Attack("mean"))
    found = swept(loaded, Sweep(modes, (0, 1, 3), draws=1), Choice(layer=1))
    assert digest(loaded.model) == before
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
    rows = list(found.runs[0].indices)
    weights = [matrix.read(loaded.base) for matrix in found.runs[0].target.ffn.inputs]
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
    assert run.target.ffn.hook is not None
    down = loaded.base.get_submodule(run.target.ffn.hook)
    hook = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).double()))
    perplexity_of(loaded)
    hook.remove()
    rows, mean = list(run.indices), torch.cat(seen).mean(0)

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


def test_controls_are_as_many_rows_and_random_ones_are_never_ranked_ones(loaded: Loaded) -> None:
    found = swept(loaded, Sweep(ks=(1, 3), draws=4))
    for k in (1, 3):
        beside = [run for run in found.runs if run.control and run.attack == Attack("zero", k)]
        assert [run.control for run in beside] == [*(f"random:{seed}" for seed in range(4)), "norm"]
        assert {len(run.indices) for run in beside} == {k}
        assert len({run.indices for run in beside}) == 5
        drawn = {row for run in beside if run.control != "norm" for row in run.indices}
        assert not drawn & set(found.runs[0].target.indices)


def test_random_rows_are_never_massive_ones_however_the_rows_were_chosen(loaded: Loaded) -> None:
    """Row 17 is the one that is truly massive in layer 1; no draw of all the others but those named may hold it."""
    for choice, k in ((Choice(), 1), (Choice(indices=(4, 5)), 2), (Choice(layer=1), 1)):
        (target,), _ = find_targets(loaded, choice, k)
        others = 64 - len({*target.indices, 17})
        assert 17 not in (random_rows(target, 64, others, 0) or (17,))
        assert random_rows(target, 64, others + 1, 0) is None


def test_truly_massive_rows_that_a_saved_scan_does_not_rank_are_said(loaded: Loaded, tmp_path: Path) -> None:
    document = scan_document(mwtool.scan_model(loaded.base))
    document["massive"]["count"] = 7
    (tmp_path / "scan.json").write_text(json.dumps(document))
    _, notes = find_targets(loaded, Choice(file=tmp_path / "scan.json"), 1)
    assert "7 rows are truly massive and 5 are ranked: random controls may be among the others" in notes


def test_rows_that_are_offloaded_are_refused_and_those_of_other_layers_are_not(tmp_path: Path) -> None:
    here = planted(tmp_path)
    places = {name: "cpu" for name, _ in here.base.named_modules() if re.fullmatch(r"model\.\w+|lm_head", name)}
    places |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(tiny.LAYERS)}
    del places["model.layers"]
    options = {"device_map": places, "offload_folder": str(tmp_path / "off")}
    loaded = replace(load(str(tmp_path), model_options=options), tokenizer=here.tokenizer)
    sweep = Sweep((Attack("zero"),), (1,), draws=1)
    found, expected = (swept(one, sweep, Choice(layer=2)) for one in (loaded, here))
    assert [run.measured[0].value for run in found.runs] == [run.measured[0].value for run in expected.runs]
    with pytest.raises(UnsupportedModel, match=r"model.layers.1.mlp is offloaded .* without offloading"):
        swept(loaded, sweep)
    # a value is fixed on its way, wherever the rows are
    fixed, plain = (swept(one, Sweep((Attack("mean"),), (1,), draws=1)) for one in (loaded, here))
    assert fixed.runs[0].measured[0].value == plain.runs[0].measured[0].value
    assert [run.control for run in fixed.runs] == [None, "random:0"]  # norms cannot be read


def test_random_rows_are_nested_and_depend_on_the_seed_alone(loaded: Loaded) -> None:
    target = Target(1, loaded.layers[1].ffns[0], (17, 3))
    draws = [random_rows(target, 64, 5, seed) for seed in range(20)]
    assert draws == [random_rows(target, 64, 5, seed) for seed in range(20)]
    assert len(set(draws)) == 20
    assert random_rows(target, 64, 3, 7) == (draws[7] or ())[:3]
    assert set(random_rows(target, 64, 62, 0) or ()) == set(range(64)) - {17, 3}
    assert random_rows(target, 64, 63, 0) is None


def test_rows_of_largest_norm_are_those_of_up_and_gate_together(loaded: Loaded) -> None:
    mlp: Any = loaded.base.get_submodule("model.layers.3.mlp")
    norms = (mlp.up_proj.weight.double() ** 2 + mlp.gate_proj.weight.double() ** 2).sum(1)
    assert list(norm_rows(loaded, Target(3, loaded.layers[3].ffns[0], ()), 4) or ()) == norms.topk(4).indices.tolist()


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
    assert "the row of largest norm, the same," in verdict.text
    more = verdict.beyond.low > 1
    less = verdict.beyond.high < 1
    assert ("matter more" in verdict.text, "matter less" in verdict.text) == (more, less)


def test_each_layer_has_a_line_with_its_own_top_rows(loaded: Loaded) -> None:
    targets, _ = find_targets(loaded, Choice(each_layer=True), 2)
    assert [target.layer for target in targets] == list(range(tiny.LAYERS))
    state = mwtool.scan_model(loaded.base, settings=mwtool.Settings(all_layers=True)).states[3]
    assert targets[3].indices == tuple(state.intermediate.abs().topk(2).indices.tolist())
    found = swept(loaded, Sweep((Attack("zero"),), (2,), draws=0), Choice(each_layer=True))
    assert [run.target.layer for run in found.runs] == list(range(tiny.LAYERS))


def test_a_layer_an_expert_and_rows_can_be_chosen(tmp_path: Path) -> None:
    loaded = planted(tmp_path, "mixtral", num_hidden_layers=4)
    (target,), _ = find_targets(loaded, Choice(layer=2, expert=3, indices=(5, 2)), 2)
    assert (target.layer, target.ffn.expert, target.indices) == (2, 3, (5, 2))
    (top,), _ = find_targets(loaded, Choice(layer=2), 3)
    assert top.ffn.expert is not None
    assert len(top.indices) == 3
    unreached = next(e for e in range(4) if _refused(loaded, Choice(layer=2, expert=e)))
    with pytest.raises(BadValue, match=f"bos is not routed to expert {unreached} of layer 2 but to"):
        find_targets(loaded, Choice(layer=2, expert=unreached), 3)


def _refused(loaded: Loaded, choice: Choice) -> bool:
    try:
        find_targets(loaded, choice, 3)
    except BadValue:
        return True
    return False


@pytest.mark.parametrize(
    ("choice", "k", "message"),
    [
        (Choice(layer=8), 1, "layer 8 does not exist; the model has layers 0 to 7"),
        (Choice(layer=1, expert=2), 1, r"layer 1 has one dense .*; there is no expert 2"),
        (Choice(layer=1, indices=(64,)), 1, "row 64 does not exist; model.layers.1.mlp in layer 1 has rows 0 to 63"),
        (Choice(indices=(64,)), 1, "row 64 does not exist"),
        (Choice(indices=(1, 2)), 3, "k is 3 and --indices names 2 rows"),
        (Choice(layer=1), 65, "k is 65"),
        (Choice(), 65, "k is 65"),
    ],
)
def test_places_that_do_not_exist_are_refused_by_name(loaded: Loaded, choice: Choice, k: int, message: str) -> None:
    with pytest.raises(BadValue, match=message):
        find_targets(loaded, choice, k)


def test_a_model_without_massive_weights_is_told_what_to_name(tmp_path: Path) -> None:
    plain = opened(tmp_path, tiny.model("llama", num_hidden_layers=4))
    for parameter in plain.base.parameters():
        parameter.data.mul_(0.1)
    with pytest.raises(
        BadValue, match=r"no massive weights to attack; name rows yourself with --layer N --indices I,J"
    ):
        find_targets(plain, Choice(), 1)


def test_what_is_not_finite_is_said_and_no_ratio_is_made_of_it(loaded: Loaded) -> None:
    found = swept(loaded, Sweep((Attack("scale", 0, 1e38),), (1,), draws=2))
    run = found.runs[0]
    assert run.measured[0].nonfinite is not None
    assert found.verdicts == ()
    document = ablate_document(loaded, found)["runs"][0]
    assert list(document["results"].values()) == [None]
    assert list(document["ratio"].values()) == [None]
    assert "finite" in next(iter(document["nonfinite"].values()))


def test_weights_are_put_back_when_a_task_fails_or_is_interrupted(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(loaded.model)
    for fault in (KeyboardInterrupt, RuntimeError):

        def fails(done: int, _total: int, _name: str, fault: type[BaseException] = fault) -> Any:
            def on_batch(_done: int, _total: int) -> None:
                if done == 2:
                    raise fault

            return on_batch

        targets, _ = find_targets(loaded, Choice(), 3)
        with pytest.raises(fault):
            ablate(loaded, targets, parse_tasks([text_of(loaded)]), Sweep(), QUICK, on_run=fails)
        assert digest(loaded.model) == before


def test_weights_are_put_back_whenever_ctrl_c_comes(loaded: Loaded) -> None:
    """From outside, at random moments of a sweep that attacks by writing and by hooks."""
    before, (target,) = digest(loaded.model), find_targets(loaded, Choice(), 3)[0]
    sweep = Sweep((Attack("zero"), Attack("retain"), Attack("mean")), (0, 1, 3), draws=1)
    moments = torch.rand(25, generator=torch.Generator().manual_seed(0)) * 0.05 + 1e-3
    former = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for moment in moments.tolist():
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it comes somewhere inside
                signal.setitimer(signal.ITIMER_REAL, moment)
                while True:
                    ablate(loaded, [target], parse_tasks([text_of(loaded)]), sweep, QUICK)
            assert digest(loaded.model) == before
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def test_continuations_are_greedy_and_those_of_the_attacked_model(loaded: Loaded) -> None:
    (target,), _ = find_targets(loaded, Choice(), 2)
    said = continuations(loaded, target, Sweep(ks=(1, 2)), prepare(loaded, [], QUICK), "w3 w5", new_tokens=6)
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
    loaded = opened(tmp_path, tiny.model("gpt2", num_hidden_layers=2))
    (target,), _ = find_targets(loaded, Choice(layer=1), 1)
    with pytest.raises(BadValue, match="the prompt has 64 tokens with bos and the model 64 positions"):
        prompt_ids(loaded, "w1 " * 63)
    assert prompt_ids(loaded, "w1 " * 62).shape == (1, 63)
    said = continuations(loaded, target, Sweep(ks=(1,)), [], "w1 " * 62)  # an absolute position more would not exist
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
        ({"mode": "mean"}, "mean needs windows"),
        ({"mode": "mean", "windows": []}, "mean needs windows .* none were given"),
        ({"k": -1}, "k is -1; expected a number from 0 on"),
        ({"k": 99}, "the scan ranked 5: scan with -k 99"),
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
    (target,), _ = find_targets(loaded, Choice(layer=1, indices=(17, 4)), 2)
    seen: list[Tensor] = []
    hook = loaded.base.get_submodule(target.ffn.hook or "").register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    before = digest(loaded.model)
    with edited(loaded.base, target.ffn, target.indices, Attack("zero", 2)), torch.no_grad():
        loaded.model(input_ids=torch.tensor([[1, 5, 6]]))
    hook.remove()
    assert bool(seen[0][..., [17, 4]].any()) == (on == "base")
    assert digest(loaded.model) == before


def measured(nll: list[float], counts: list[float]) -> Measured:
    value = math.exp(math.fsum(nll) / sum(counts))
    return Measured("ppl:x", "perplexity", value, None, len(nll), 0.0, tuple(nll), tuple(counts), digest="d")


def test_the_paired_interval_holds_the_true_ratio_in_95_of_100_cases() -> None:
    """Windows whose difficulty varies much more than the difference: 2,000 draws, so +-1.5 points at 3 sigma."""
    generator, held = torch.Generator().manual_seed(0), 0
    counts = [15.0] * 11 + [6.0]
    for _ in range(2000):
        difficulty = 3 + torch.randn(12, generator=generator, dtype=torch.float64)
        change = 0.2 + 0.1 * torch.randn(12, generator=generator, dtype=torch.float64)
        n = torch.tensor(counts, dtype=torch.float64)
        plain, attacked = (difficulty * n).tolist(), ((difficulty + change) * n).tolist()
        ratio = paired_ratio(measured(attacked, counts), [measured(plain, counts)])
        assert ratio.low is not None
        assert ratio.high is not None
        held += ratio.low <= math.exp(0.2) <= ratio.high
    assert 0.925 < held / 2000 < 0.975


def test_the_ratio_is_that_of_the_perplexities_and_of_several_their_geometric_mean() -> None:
    one, two, three = (
        measured([3, 4, 5, 6, 2], [2, 2, 2, 2, 1]),
        measured([2, 3, 4, 5, 1], [2, 2, 2, 2, 1]),
        measured([1, 1, 1, 1, 1], [2, 2, 2, 2, 1]),
    )
    assert paired_ratio(one, [two]).value == pytest.approx(one.value / two.value, rel=1e-12)
    expected = one.value / math.sqrt(two.value * three.value)
    assert paired_ratio(one, [two, three]).value == pytest.approx(expected, rel=1e-12)
    assert paired_ratio(measured([1, 2, 3], [1, 1, 1]), [measured([1, 1, 1], [1, 1, 1])]).low is None  # too few


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(3, 3.182446), (5, 2.570582), (10, 2.228139), (30, 2.042272), (209, 1.971379)]
)
def test_quantiles_of_student_t_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, rel=5e-3)


@pytest.mark.parametrize(
    ("change", "mode", "words"),
    [
        (0.5, "zero", "matter more than random"),
        (0.0, "zero", "do no more and no less"),
        (0.5, "retain", "leaves less"),
        (-0.3, "retain", "leaves more"),
    ],
)
def test_the_verdict_says_what_the_figures_say(change: float, mode: Any, words: str) -> None:
    generator = torch.Generator().manual_seed(1)
    plain = [3 + float(x) for x in torch.randn(30, generator=generator)]
    noise = [0.01 * float(x) for x in torch.randn(30, generator=generator)]
    counts = [1.0] * 30
    attacked = measured([p + change + n for p, n in zip(plain, noise, strict=True)], counts)
    random = [measured([p + s * n for p, n in zip(plain, noise[::-1], strict=True)], counts) for s in (1, -1, 0.5)]
    found = judge(
        Attack(mode, 5), attacked, measured(plain, counts), random=random, norm=None, shared=0, layer=1, expert=None
    )
    assert found is not None
    assert words in found.text
    assert f"by {statistics.fmean(found.random):.2f} (3 draws" in found.text


def test_what_is_done_to_the_same_rows_is_measured_once(loaded: Loaded) -> None:
    """The planted row is also the one of largest norm."""
    names: list[str] = []
    targets, _ = find_targets(loaded, Choice(), 1)
    found = ablate(
        loaded,
        targets,
        parse_tasks([text_of(loaded)]),
        Sweep((Attack("zero"),), (0, 1), draws=2),
        QUICK,
        on_run=lambda _done, _total, name: names.append(name),
    )
    expected = ["baseline", *(f"layer 1, zero:1{beside}" for beside in ("", " (random:0)", " (random:1)"))]
    assert names == expected
    assert [run.control for run in found.runs] == [None, None, "random:0", "random:1", "norm"]
    assert found.runs[4].measured == found.runs[1].measured != found.runs[2].measured


def accuracy(value: float) -> Measured:
    return Measured("mc:x.jsonl", "acc", value, None, 4, 0.0, (1.0, 0.0))


def made_up(loaded: Loaded) -> Ablation:
    """A perplexity and an accuracy, under one attack, two random controls and the rows of largest norm."""
    target, attack = Target(1, loaded.layers[1].ffns[0], (17, 3)), Attack("zero", 1)
    plain = [3.0, 4.0, 5.0, 6.0, 2.0]
    counts = [1.0] * 5

    def run(control: str | None, more: float, right: float) -> Run:
        return Run(attack, control, target, (17,), (measured([x + more for x in plain], counts), accuracy(right)))

    runs = (run(None, 0.5, 0.25), run("random:0", 0.1, 0.5), run("random:1", 0.3, 0.75), run("norm", 0.2, 0.5))
    return Ablation((measured(plain, counts), accuracy(0.5)), runs, (), ())


def test_an_accuracy_has_points_and_no_ratio(loaded: Loaded) -> None:
    run = ablate_document(loaded, made_up(loaded))["runs"][0]
    assert run["ratio"] == {"ppl:x": pytest.approx(math.exp(0.5)), "mc:x.jsonl": None}
    assert run["delta"] == {"ppl:x": None, "mc:x.jsonl": -25.0}


def test_the_table_shows_the_mean_and_the_spread_of_the_controls(loaded: Loaded) -> None:
    console = Console(width=120, file=io.StringIO(), no_color=True)
    console.print(ablate_report(made_up(loaded), width=120))
    assert isinstance(console.file, io.StringIO)
    line = next(line for line in console.file.getvalue().splitlines() if line.startswith("zero"))
    ratios = [math.exp(0.1), math.exp(0.3)]
    spread = f"{statistics.fmean(ratios):.2f} ± {statistics.stdev(ratios):.2f}"
    expected = (
        f"zero 1 {math.exp(4.5):.2f} x{math.exp(0.5):.2f} {spread} {math.exp(0.2):.2f} 25.0 -25.0 +12.5 ± 17.7 +0.0"
    )
    assert line.split() == expected.split()


@pytest.mark.parametrize("model_type", ["phi3", "gpt2", "mixtral"])
def test_a_figure_is_drawn_for_fused_transposed_and_expert_rows(tmp_path: Path, model_type: str) -> None:
    loaded = opened(tmp_path, tiny.model(model_type, num_hidden_layers=2))
    for choice in (Choice(layer=1), Choice(each_layer=True)):
        plot_ablation(swept(loaded, Sweep(ks=(1,), draws=1), choice), tmp_path / "curve.svg")
        assert (tmp_path / "curve.svg").read_text().count("random rows") == 2
        (tmp_path / "curve.svg").unlink()


def test_several_layers_are_drawn_over_the_layers(loaded: Loaded) -> None:
    from matplotlib import pyplot as plt

    found = swept(loaded, Sweep((Attack("zero"),), (1, 2), draws=0), Choice(each_layer=True))
    _, panel = plt.subplots()
    _curves(panel, found, found.baseline[0].task)
    lines = {str(line.get_label()): line for line in panel.lines}
    axis = panel.get_xlabel()
    plt.close("all")
    assert axis == "layer"
    for k in (1, 2):
        values = [run.measured[0].value for run in found.runs if run.attack.k == k]
        expected = [value / found.baseline[0].value for value in values]
        assert list(lines[f"zero:{k}"].get_xdata()) == list(range(tiny.LAYERS))
        assert list(lines[f"zero:{k}"].get_ydata()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("more", "scale"), [(0.5, "linear"), (3.0, "log"), (6.0, "log")])
def test_ratios_over_more_than_a_decade_have_a_log_axis(loaded: Loaded, more: float, scale: str) -> None:
    """Of 20 and of 400 times the perplexity: the larger the ratio, the further below zero a linear axis begins."""
    from matplotlib import pyplot as plt

    found = made_up(loaded)
    plain = found.baseline[0]
    assert plain.weights is not None
    attacked = measured([x + more for x in plain.samples], list(plain.weights))
    first = replace(found.runs[0], measured=(attacked, found.runs[0].measured[1]))
    _, panel = plt.subplots()
    _curves(panel, replace(found, runs=(first, *found.runs[1:])), "ppl:x")
    drawn = panel.get_yscale()
    plt.close("all")
    assert drawn == scale


def test_the_curves_of_an_accuracy_are_points(loaded: Loaded) -> None:
    from matplotlib import pyplot as plt

    _, panel = plt.subplots()
    _curves(panel, made_up(loaded), "mc:x.jsonl")
    own, random, norm, zero = [list(line.get_ydata()) for line in panel.lines]
    label = panel.get_ylabel()
    plt.close("all")
    assert (own, random, norm, set(zero)) == ([-25.0], [12.5], [0.0], {0})
    assert "points" in label


def test_the_legend_hides_no_curve(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its box lies beside the axes, whatever is drawn in them."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_options: drawn.append(figure))
    modes = tuple(map(parse_mode, ("zero", "retain", "mean", "scale:0.5")))
    plot_ablation(swept(loaded, Sweep(modes, (0, 1, 3), draws=2)), tmp_path / "curve.png")
    (panel,) = drawn[0].axes
    legend = panel.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == len(panel.lines) - 1 == 12
    assert legend.get_window_extent().x0 >= panel.get_window_extent().x1


def test_the_curves_are_the_ratios_over_k(loaded: Loaded) -> None:
    from matplotlib import pyplot as plt

    found = swept(loaded, Sweep((Attack("retain"),), (0, 1, 3), draws=2))
    _, panel = plt.subplots()
    _curves(panel, found, found.baseline[0].task)
    own, random, norm, one = panel.lines
    plt.close("all")
    ratios = {(run.attack.k, run.control): run.measured[0].value / found.baseline[0].value for run in found.runs}
    assert list(own.get_xdata()) == [0, 1, 3]
    assert list(own.get_ydata()) == pytest.approx([ratios[k, None] for k in (0, 1, 3)], rel=1e-9)
    means = [(ratios[k, "random:0"] + ratios[k, "random:1"]) / 2 for k in (1, 3)]
    assert list(random.get_ydata()) == pytest.approx(means, rel=1e-9)
    assert list(norm.get_ydata()) == pytest.approx([ratios[k, "norm"] for k in (1, 3)], rel=1e-9)
    assert set(one.get_ydata()) == {1}
