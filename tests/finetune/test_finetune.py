"""A run from plan to adapter: what is trained, what is left, and what is refused before it begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from training import IDS, digest, gradients
from transformers import AutoModelForCausalLM
from words import WORDS, planted_folder, with_tokenizer

from mwtool.errors import BadValue, MwtoolError, OutputError, UnsupportedModel
from mwtool.finetune import trainer
from mwtool.finetune.checkpointing import MARK, clear, mark, newest
from mwtool.finetune.config import Asked, Recipe
from mwtool.finetune.memory import footprint
from mwtool.finetune.plan import Plan, make_plan
from mwtool.finetune.trainer import Telling, Trained, adapted, train, with_adapter
from mwtool.macdrop.curriculum import curriculum_of
from mwtool.models.load import load
from mwtool.models.locate import locate
from mwtool.models.rewrite import save_merged

QUICK = Recipe(
    curriculum=curriculum_of("step:0.8"), rank=4, alpha=4, lr=1e-2, max_length=16, batch_size=2, effective_batch=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a massive row, its tokenizer, and 95 words to train on."""
    return planted_folder(tmp_path_factory.mktemp("model"))


def planned(folder: Path, recipe: Recipe = QUICK, **asked: Any) -> Plan:
    return make_plan(locate(str(folder)), recipe, Asked(**{"data": str(folder / "text.txt"), **asked}))


def trained(plan: Plan, into: Path, **options: Any) -> Trained:
    into.mkdir(exist_ok=True)
    model = with_adapter(plan.source, plan.recipe, "cpu")
    return train(model, (plan.train, plan.held), plan.places, plan.recipe, into, settings=plan.settings(), **options)


@pytest.mark.parametrize("peft", ["lora", "dora"])
def test_the_adapter_is_trained_the_model_is_not_and_peft_alone_can_load_it(
    folder: Path, tmp_path: Path, peft: Any
) -> None:
    plan = planned(folder, replace(QUICK, peft=peft))
    model = with_adapter(plan.source, plan.recipe, "cpu")
    before = digest(model)
    done = train(model, (plan.train, plan.held), plan.places, plan.recipe, tmp_path)
    assert digest(model) == before
    assert done.steps == plan.steps == done.step
    assert list(done.history.values()) == pytest.approx(plan.recipe.curriculum.values(plan.steps, plan.per_epoch))
    assert (done.how, done.rows[0], len(done.rows)) == ("weights", 17, 5)
    base = AutoModelForCausalLM.from_pretrained(folder)
    alone = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.tensor([[1, 5, 9, 3]])
    assert torch.equal(alone(ids).logits, done.model.eval()(ids).logits)
    with alone.disable_adapter():
        assert not torch.allclose(alone(ids).logits, done.model(ids).logits)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["use_dora"]) == (str(folder.resolve()), peft == "dora")
    assert not (tmp_path / "training_args.bin").exists()


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    tied = tiny.model("llama", tie_word_embeddings=True)
    tiny.plant(tied)
    folder = with_tokenizer(tmp_path, tied)
    needed = footprint(planned(folder, replace(QUICK, dtype="float32")))
    assert needed.parameters == tied.num_parameters()
    assert needed.weights == 4 * tied.num_parameters()


def test_an_adapter_of_a_model_named_from_here_is_found_from_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    source = locate(folder.name)
    with_adapter(source, QUICK, "cpu").save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert load("adapter").source.folder == folder.resolve()


def test_macdrop_changes_what_is_learned_and_none_is_plain_lora(folder: Path, tmp_path: Path) -> None:
    found = {}
    for name, curriculum in (("none", "none"), ("step", "step:0.8"), ("again", "step:0.8")):
        plan = planned(folder, replace(QUICK, curriculum=curriculum_of(curriculum)))
        done = trained(plan, tmp_path / name)
        assert (done.how is None) == (name == "none")
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert not same(found["none"], found["step"])
    assert same(found["again"], found["step"])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_plan_counts_steps_parameters_and_rows_as_the_run_finds_them(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder, replace(QUICK, epochs=2.5, peft="dora"))
    needed = footprint(plan)
    model = with_adapter(plan.source, plan.recipe, "cpu")
    assert needed.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert needed.parameters + needed.trainable == sum(p.numel() for p in model.parameters())
    assert needed.weights == 4 * needed.parameters
    assert needed.kept == 4 * 2 * 5 * 32
    assert train(model, (plan.train, plan.held), plan.places, plan.recipe, tmp_path).step == plan.steps


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_effective_batch_is_reached_by_accumulation(folder: Path, tmp_path: Path, batch: int) -> None:
    plan = planned(folder, replace(QUICK, batch_size=batch, eval_share=0, epochs=1, curriculum=curriculum_of("none")))
    done = trained(plan, tmp_path / "run")
    reference = trained(planned(folder, replace(plan.recipe, batch_size=4)), tmp_path / "reference")
    # sums of other parts, and Adam divides small gradients by their own size
    for one, other in zip(done.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("way", ["batches of 1", "no padding", "packed without padding", "all logits"])
def test_adapter_and_held_out_loss_are_those_of_the_plain_path(
    folder: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the sequences of a step are put together: to rounding, which Adam divides by small gradients."""
    talks = [{"instruction": "w1 w2", "output": " ".join(WORDS[: 1 + 2 * (n % 5)])} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, talks)))
    set_ = replace(QUICK, max_length=64, batch_size=4, eval_share=0.3, padding_free=False, lr=1e-3)
    set_ = replace(set_, packing=way.startswith("packed"), max_steps=4)
    other = {"batches of 1": {"batch_size": 1}, "all logits": {}}.get(way, {"padding_free": True})
    plan = planned(folder, set_, data=str(tmp_path / "rows.jsonl"))
    reference = trained(plan, tmp_path / "plain")
    if way == "all logits":
        monkeypatch.setattr(trainer, "trained_head", lambda _model: None)
    found = trained(replace(plan, recipe=replace(set_, **other)), tmp_path / "other")
    for one, two in zip(found.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-5)
    losses = [[e["eval_loss"] for e in run.log if "eval_loss" in e] for run in (found, reference)]
    assert len(losses[0]) >= 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_gradient_checkpointing_learns_the_same_adapter_to_rounding(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder)
    plainly = trained(plan, tmp_path / "plain")
    again = trained(planned(folder, replace(QUICK, gradient_checkpointing=True)), tmp_path / "checkpointed")
    for one, other in zip(plainly.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_model_packed_in_4_bit_is_trained_by_outputs_and_its_gradients_survive_evaluation(tmp_path: Path) -> None:
    """On some processors bitsandbytes repacks weights when it evaluates, in a layout that passes on no gradients."""
    pytest.importorskip("bitsandbytes", reason="an optional library")
    made = tiny.model("llama", hidden_size=64, head_dim=16)  # a block is 64 wide
    tiny.plant(made)
    (tmp_path / "model").mkdir()
    recipe = replace(QUICK, quantize="4bit")
    plan = planned(with_tokenizer(tmp_path / "model", made), recipe)
    model = with_adapter(plan.source, recipe, "cpu")
    before = gradients(model.train())
    with torch.no_grad():
        model.eval()(IDS)
    after = gradients(model.train())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    done = trained(plan, tmp_path / "run")
    assert (done.how, done.step) == ("outputs", plan.steps)
    again = trained(replace(plan, recipe=replace(recipe, gradient_checkpointing=True)), tmp_path / "checkpointed")
    for one, other in zip(done.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    with pytest.raises(UnsupportedModel, match="DoRA's norm reads the rows, which are packed"):
        planned(tmp_path / "model", replace(recipe, peft="dora"))


def test_the_merged_checkpoint_gives_what_model_and_adapter_give(folder: Path, tmp_path: Path) -> None:
    done = trained(planned(folder), tmp_path / "run")
    save_merged(load(str(tmp_path / "run"), on="merged"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[1, 5, 9, 3]])
    torch.testing.assert_close(merged(ids).logits, done.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert digest(merged) != digest(AutoModelForCausalLM.from_pretrained(folder))


def test_held_out_loss_is_measured_before_after_each_epoch_and_at_the_end(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder, replace(QUICK, epochs=2.5, eval_share=0.2))
    done = trained(plan, tmp_path)
    at = [entry["step"] for entry in done.log if "eval_loss" in entry]
    assert at == [0, plan.per_epoch, 2 * plan.per_epoch, plan.steps]


def test_an_adapter_a_model_without_massive_rows_or_without_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    trained(planned(folder, replace(QUICK, max_steps=1)), tmp_path / "run")
    with pytest.raises(BadValue, match="training begins with a new one: give its base model"):
        planned(tmp_path / "run", data=str(folder / "text.txt"))
    bare = tiny.model("llama", num_hidden_layers=4)
    for parameter in bare.parameters():
        parameter.data.mul_(0.1)
    other = with_tokenizer(tmp_path, bare)
    with pytest.raises(BadValue, match="nothing for MacDrop to drop: give --massive FILE, or train without"):
        planned(other)
    plan = planned(other, allow_none=True)
    assert plan.places == ()
    assert any("trained without MacDrop" in one for one in plan.notes)
    assert trained(plan, tmp_path / "plain").history == {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    with pytest.raises(BadValue, match="has no tokenizer; training needs one"):
        planned(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "an effective batch of 4 is no multiple of 3 sequences on 1 device"),
        ({"curriculum": curriculum_of("step:0.8", k=99)}, "k is 99"),
    ],
)
def test_a_recipe_that_does_not_come_out_is_refused_before_training(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadValue, match=message):
        planned(folder, replace(QUICK, **changes))


def test_target_modules_that_do_not_exist_are_refused(folder: Path) -> None:
    plan = planned(folder, replace(QUICK, target_modules=("absent_proj",)))
    with pytest.raises(BadValue, match=r"no adapter can be put on .*absent_proj"):
        with_adapter(plan.source, plan.recipe, "cpu")


def test_the_sequence_length_is_no_more_than_the_model_has(folder: Path) -> None:
    positions = AutoModelForCausalLM.from_pretrained(folder).config.max_position_embeddings
    plan = planned(folder, replace(QUICK, max_length=10 * positions, eval_share=0))
    assert plan.recipe.max_length == positions
    assert f"shortened to the {positions} positions the model has" in plan.notes[0]


@example(rows=73, batch=2, processes=2, times=2, epochs=0.10000000000000002)  # one step and a last bit are two
@given(st.integers(1, 200), st.integers(1, 4), st.integers(1, 3), st.integers(1, 8), st.floats(0.1, 5))
def test_steps_come_in_whole_accumulations(rows: int, batch: int, processes: int, times: int, epochs: float) -> None:
    recipe = Recipe(batch_size=batch, effective_batch=batch * processes * times, epochs=epochs)
    steps, per_epoch = recipe.steps(rows, processes)
    assert recipe.accumulation(processes) == times
    assert (per_epoch - 1) * recipe.effective_batch < rows <= per_epoch * recipe.effective_batch
    assert steps - 1 < epochs * per_epoch <= steps


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), MwtoolError, r"out of memory in step 1: lower --batch-size "),
        (MemoryError(), MwtoolError, r"lower --batch-size \(now 2; the effective batch stays 4\) or --max-length"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MwtoolError, "--gradient-checkpointing or --qua"),
        (OSError(28, "No space left on device"), OutputError, "No space left on device; make room, then continue with"),
        (RuntimeError("PytorchStreamWriter failed writing file"), OutputError, "the disk does not take all of it"),
        (RuntimeError("something else"), RuntimeError, "something else"),
    ],
)
def test_an_end_of_memory_or_disk_says_what_to_do(
    folder: Path, tmp_path: Path, fault: Exception, kind: type[Exception], message: str
) -> None:
    plan = planned(folder, replace(QUICK, eval_share=0))
    model = with_adapter(plan.source, plan.recipe, "cpu")
    before = digest(model)

    def fail(*_args: Any, **_options: Any) -> None:
        raise fault

    model.get_base_model().model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(kind, match=message):
        train(model, (plan.train, plan.held), plan.places, plan.recipe, tmp_path)
    assert digest(model) == before  # also the rows that were masked


def test_a_loss_that_is_not_finite_stops_the_run_and_says_so(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder, replace(QUICK, eval_share=0))
    model = with_adapter(plan.source, plan.recipe, "cpu")
    model.get_base_model().lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(MwtoolError, match="the loss is nan at step 1: lower --lr"):
        train(model, (plan.train, plan.held), plan.places, plan.recipe, tmp_path)


def test_an_unknown_logger_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder)
    with pytest.raises(BadValue, match="--report-to abacus"):
        trained(plan, tmp_path, telling=Telling(loggers=("abacus",)))


def test_where_the_run_stands_is_told_each_step(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder)
    seen: list[Any] = []
    trained(plan, tmp_path, telling=Telling(logging_steps=1, on_step=seen.append))
    assert [one.step for one in seen] == [t for t in range(1, plan.steps + 1) for _ in range(2)]
    assert [one.logged for one in seen[:2]] == [False, True]
    assert [one.p for one in seen[::2]] == pytest.approx(plan.recipe.curriculum.values(plan.steps))


def checkpoint(run: Path, step: int, settings: dict[str, Any], files: tuple[str, ...] = ("a.bin", "b.bin")) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"12345678")
    mark(folder, settings, {1: 0.8})
    return folder


def test_the_newest_whole_checkpoint_is_found_and_half_written_ones_are_passed_over(tmp_path: Path) -> None:
    settings = {"lr": 0.1, "curriculum": {"k": 5}}
    assert newest(tmp_path, settings) == (None, ())
    for step in (5, 10, 20, 30, 40):
        checkpoint(tmp_path, step, settings)
    (tmp_path / "checkpoint-20" / "b.bin").write_bytes(b"1234")
    (tmp_path / "checkpoint-30" / "a.bin").unlink()
    (tmp_path / "checkpoint-40" / MARK).write_text("{")
    (tmp_path / "checkpoint-notes").mkdir()
    found, notes = newest(tmp_path, settings)
    assert found is not None
    assert (found.step, found.history) == (10, {1: 0.8})
    assert [note.split()[0].rpartition("-")[2] for note in notes] == ["40", "30", "20"]
    clear(tmp_path, found.step)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5", "checkpoint-notes"]


def test_a_checkpoint_with_a_sharded_state_in_a_folder_is_whole_while_each_of_its_parts_is(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 3, {}, ("a.bin", "model_0/one.distcp", "model_0/two.distcp"))
    assert newest(tmp_path, {})[0] is not None
    (made / "model_0" / "two.distcp").write_bytes(b"12345679")
    assert newest(tmp_path, {})[0] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.2, "curriculum": {"k": 5}}, "was made with lr 0.1, and lr is now 0.2"),
        ({"lr": 0.1, "curriculum": {"k": 3}}, "was made with curriculum.k 5, and curriculum.k is now 3"),
        ({"lr": 0.1, "curriculum": {"k": 5}, "more": [1]}, r"was made with more null, and more is now \[1\]"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_and_the_first_difference_named(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    checkpoint(tmp_path, 3, {"lr": 0.1, "curriculum": {"k": 5}})
    with pytest.raises(BadValue, match=message):
        newest(tmp_path, settings)


def test_a_plan_of_other_data_or_rows_has_other_settings(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(" ".join(WORDS))
    one, other = planned(folder), planned(folder, data=str(tmp_path / "other.txt"))
    assert one.settings() == planned(folder).settings()
    assert {key for key, value in one.settings().items() if other.settings()[key] != value} == {"data"}


def test_an_adapter_is_the_same_for_the_same_seed_and_another_for_another(folder: Path) -> None:
    def drawn(seed: int) -> torch.Tensor:
        model = with_adapter(locate(str(folder)), replace(QUICK, seed=seed), "cpu")
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_embeddings_and_head_have_no_adapter_by_default(folder: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(folder), locate(str(folder)), QUICK)
    wrapped = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name
    }
    assert wrapped == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
