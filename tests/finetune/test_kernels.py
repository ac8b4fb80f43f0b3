"""Compiled models, Liger's kernels and batches of similar length: what they train, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from transformers import TrainingArguments
from transformers.utils import import_utils
from words import WORDS, planted_folder

from mwtool.errors import BadValue, MwtoolError, UnsupportedModel
from mwtool.finetune import trainer
from mwtool.finetune.checkpointing import _refuse_other, newest
from mwtool.finetune.config import Asked, Recipe
from mwtool.finetune.kernels import refuse_on, refuse_together
from mwtool.finetune.padding_free import chosen
from mwtool.finetune.plan import Plan, make_plan
from mwtool.finetune.sequences import collate
from mwtool.finetune.token_trainer import GroupedByLength
from mwtool.finetune.trainer import Telling, Trained, train, with_adapter
from mwtool.macdrop.curriculum import curriculum_of
from mwtool.models.locate import locate

QUICK = Recipe(
    curriculum=curriculum_of("linear:1-0.5"), rank=4, alpha=4, lr=1e-2, max_length=64, batch_size=2, effective_batch=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model"), num_hidden_layers=3)  # as few as possible to compile


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Records of unequal length."""
    talks = [{"instruction": "w1 w2", "output": " ".join(WORDS[: 1 + 3 * (n % 7)])} for n in range(24)]
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, talks)))
    return str(file)


def planned(folder: Path, recipe: Recipe, data: str) -> Plan:
    return make_plan(locate(str(folder)), recipe, Asked(data=data))


def trained(plan: Plan, into: Path, **options: Any) -> Trained:
    into.mkdir(exist_ok=True)
    model = with_adapter(plan.source, plan.recipe, "cpu")
    return train(model, (plan.train, plan.held), plan.places, plan.recipe, into, settings=plan.settings(), **options)


def weights(done: Trained) -> dict[str, torch.Tensor]:
    return {name: one.detach() for name, one in done.model.named_parameters() if one.requires_grad}


def _without_code(**options: Any) -> TrainingArguments:
    return TrainingArguments(**options, torch_compile_backend="aot_eager")


# torch warns of its own tracing
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_run_drops_the_rows_in_place_and_learns_the_adapter_of_the_plain_one(
    folder: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain run with MacDrop, and against one without: a graph that kept old rows learns the latter."""
    plan = planned(folder, replace(QUICK, max_steps=2, lr=1e-3, effective_batch=2, eval_share=0), rows)
    idle = planned(folder, replace(plan.recipe, curriculum=curriculum_of("none")), rows)
    plain, without = weights(trained(plan, tmp_path / "plain")), weights(trained(idle, tmp_path / "without"))
    # as inductor, but for generating code, which takes a minute
    monkeypatch.setattr(trainer, "TrainingArguments", _without_code)
    counters.clear()
    compiled = weights(trained(replace(plan, recipe=replace(plan.recipe, torch_compile=True)), tmp_path / "compiled"))
    assert counters["stats"]["unique_graphs"] > 0
    for name, one in compiled.items():
        torch.testing.assert_close(one, plain[name], rtol=1e-2, atol=1e-5)
    assert max(float((one - without[name]).abs().max()) for name, one in compiled.items()) > 1e-4


# torch warns of its own tracing
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_without_a_cxx_compiler_a_compiled_run_ends_in_one_line(folder: Path, rows: str, tmp_path: Path) -> None:
    plan = planned(folder, replace(QUICK, max_steps=1, eval_share=0, torch_compile=True), rows)
    failing = pytest.raises(MwtoolError, match=r"^torch.compile failed \(.*\): .* or leave out --torch-compile$")
    with inductor.patch("cpp.cxx", ("no-such-compiler",)), failing:
        trained(plan, tmp_path / "run")


def test_batches_by_length_have_less_padding_and_take_every_sequence_once() -> None:
    lengths = torch.randint(3, 60, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = GroupedByLength(4, lengths=lengths, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(400))
    assert order == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != order

    def padding(order: list[int]) -> int:
        batches = [[lengths[one] for one in order[at : at + 4]] for at in range(0, len(order), 4)]
        return sum(4 * max(batch) - sum(batch) for batch in batches)

    assert padding(order) < padding(list(range(400))) / 5


def test_a_run_by_length_that_was_cut_in_a_later_epoch_ends_with_the_adapter_of_the_whole_one(
    folder: Path, rows: str, tmp_path: Path
) -> None:
    plan = planned(folder, replace(QUICK, group_by_length=True, epochs=2, eval_share=0, effective_batch=8), rows)
    whole = trained(plan, tmp_path / "run", telling=Telling(save_steps=1))
    assert not torch.equal(*(next(iter(weights(one).values())) for one in (whole, _plainly(plan, tmp_path))))
    (tmp_path / "run" / f"checkpoint-{plan.steps}" / "mwtool_checkpoint.json").unlink()
    found, _ = newest(tmp_path / "run", plan.settings())
    assert found is not None
    assert plan.per_epoch < found.step < plan.steps
    again = trained(plan, tmp_path / "run", resume=found)
    for name, one in weights(again).items():
        assert torch.equal(one, weights(whole)[name]), name


def _plainly(plan: Plan, folder: Path) -> Trained:
    return trained(replace(plan, recipe=replace(plan.recipe, group_by_length=False)), folder / "plainly")


def test_a_checkpoint_of_before_these_settings_existed_is_one_without_them(
    folder: Path, rows: str, tmp_path: Path
) -> None:
    plan = planned(folder, replace(QUICK, max_steps=1), rows)
    trained(plan, tmp_path / "run")
    found, _ = newest(tmp_path / "run", plan.settings())
    assert found is not None
    older = replace(found, settings={key: value for key, value in found.settings.items() if key != "torch_compile"})
    _refuse_other(older, plan.settings())
    with pytest.raises(BadValue, match="was made with torch_compile false, and torch_compile is now true"):
        _refuse_other(older, {**plan.settings(), "torch_compile": True})


@pytest.mark.parametrize("setting", ["group_by_length", "torch_compile"])
def test_batches_keep_their_padding_and_rows_without_are_refused(
    folder: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mwtool.finetune import padding_free

    monkeypatch.setattr(padding_free, "_has_kernel", lambda _model, _dtype: True)
    recipe = replace(QUICK, **{setting: True})
    assert chosen(None, recipe) is collate
    with pytest.raises(BadValue, match=f"^--padding-free and --{setting.replace('_', '-')} exclude each other"):
        refuse_together(replace(recipe, padding_free=True), 1)


def test_a_compiled_model_is_refused_where_masks_are_not_proven_and_needs_no_proof_without_macdrop() -> None:
    recipe = replace(QUICK, torch_compile=True)
    for case, processes in ((replace(recipe, quantize="4bit"), 1), (recipe, 2)):
        with pytest.raises(UnsupportedModel, match=r"leave out --torch-compile$"):
            refuse_together(case, processes)
        refuse_together(replace(case, curriculum=curriculum_of("none")), processes)
    refuse_together(recipe, 1)


def test_liger_kernels_need_the_package_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(QUICK, use_liger_kernel=True)
    monkeypatch.setattr(import_utils, "is_liger_kernel_available", lambda: False)
    with pytest.raises(BadValue, match=r"^--use-liger-kernel needs the package liger_kernel \(0.3.0 or newer\)"):
        refuse_together(recipe, 1)
    monkeypatch.setattr(import_utils, "is_liger_kernel_available", lambda: True)
    refuse_together(recipe, 1)
    with pytest.raises(BadValue, match=r"^--use-liger-kernel needs a GPU, and the device is cpu"):
        refuse_on("cpu", recipe)
    refuse_on("cuda:0", recipe)


def test_the_trainer_is_given_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def arguments(**options: Any) -> TrainingArguments:
        given.update(options)
        return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")

    monkeypatch.setattr(trainer, "TrainingArguments", arguments)
    for chosen_ in (False, True):
        recipe = replace(QUICK, group_by_length=chosen_, torch_compile=chosen_, use_liger_kernel=chosen_)
        trainer._arguments(recipe, tmp_path, Telling(), counts=(4, 2), processes=1, device="cpu")
        assert given["train_sampling_strategy"] == ("group_by_length" if chosen_ else "random")
        assert (given["torch_compile"], given["use_liger_kernel"]) == (chosen_, chosen_)
