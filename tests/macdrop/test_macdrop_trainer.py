"""MacDrop in Trainer and SFTTrainer: clean weights whenever anyone looks, equal to the loop written by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import IDS, digest, massive, small, with_adapter
from transformers import Trainer, TrainerCallback, TrainingArguments

from mwtool import MacDrop, MacDropCallback, guard
from mwtool.errors import BadValue
from mwtool.macdrop.curriculum import curriculum_of

ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(3, 50, (8, 6), generator=torch.Generator())]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**options, **changes})


class Watch(TrainerCallback):
    """Hashes the model whenever others may look at it, and inside the steps."""

    def __init__(self) -> None:
        self.seen: dict[str, list[str]] = {}

    def _take(self, event: str) -> Any:
        def method(_args: Any, _state: Any, _control: Any, **kwargs: Any) -> None:
            self.seen.setdefault(event, []).append(digest(kwargs["model"]))

        return method

    def __getattribute__(self, name: str) -> Any:
        watched = ("on_pre_optimizer_step", "on_save", "on_prediction_step", "on_evaluate", "on_log", "on_train_end")
        return self._take(name) if name in watched else super().__getattribute__(name)


def trainer_of(folder: Path, *callbacks: TrainerCallback, model: Any = None, **changes: Any) -> Trainer:
    return Trainer(
        model=model or with_adapter(small()),
        args=arguments(folder, **changes),
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        callbacks=list(callbacks),
    )


def test_weights_are_pretrained_at_every_evaluation_save_and_log_and_after_training(tmp_path: Path) -> None:
    base = small()
    before, watch = digest(base), Watch()
    model = with_adapter(base)
    before = digest(model)
    # Trainer calls callbacks in order: the watch sees what MacDrop leaves
    trainer = trainer_of(
        tmp_path,
        MacDropCallback(massive(base), "constant:0.5"),
        watch,
        model=model,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    clean = {"on_save": 2, "on_prediction_step": 4, "on_evaluate": 4, "on_train_end": 1}
    assert {event: len(watch.seen[event]) for event in clean} == clean
    assert all(found == before for event in (*clean, "on_log") for found in watch.seen[event])
    assert before not in watch.seen["on_pre_optimizer_step"]
    assert digest(model) == before


@pytest.mark.parametrize("resample", ["step", "microbatch"])
def test_the_callback_trains_as_the_engine_in_a_plain_loop(tmp_path: Path, resample: Any) -> None:
    curriculum = curriculum_of("linear:0.9-0.1", resample=resample, seed=3)
    base = small()
    model = with_adapter(base)
    trainer = trainer_of(
        tmp_path,
        MacDropCallback(massive(base), curriculum),
        model=model,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
    )
    order = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    torch.manual_seed(trainer.args.seed)
    trainer.train()
    other_base = small()
    other = with_adapter(other_base)
    parameters = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    macdrop = MacDrop(other, massive(other_base), curriculum, steps=4)
    for t in range(1, 5):
        with macdrop.step(t):
            for number, batch in enumerate(order[2 * t - 2 : 2 * t]):
                if number:
                    macdrop.next_microbatch()
                (loss(other, batch) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = dict(model.named_parameters())
    # Trainer divides the summed loss by the tokens of both micro-batches: equal up to float32's rounding
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-5, atol=1e-6)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, labels=ids).loss
    return found


def test_p_of_each_step_is_logged(tmp_path: Path) -> None:
    base = small()
    trainer = trainer_of(tmp_path, MacDropCallback(massive(base), "step:0.8"), model=with_adapter(base))
    trainer.train()
    logged = [entry["macdrop_p"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([0.6, 0.4, 0.2, 0.0])


def test_epochs_are_counted_as_trainer_counts_them(tmp_path: Path) -> None:
    base = small()
    callback = MacDropCallback(massive(base), "epoch-before:0.8")
    trainer_of(tmp_path, callback, model=with_adapter(base), max_steps=-1, num_train_epochs=2).train()
    assert callback.engine is not None
    assert list(callback.engine.history.values()) == pytest.approx([0.8] * 4 + [0.4] * 4)


class Failing(TrainerCallback):
    def __init__(self, fault: type[BaseException]) -> None:
        self.fault = fault

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        raise self.fault("in the middle of a step")


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_guard_restores_on_exceptions_and_ctrl_c(tmp_path: Path, fault: type[BaseException]) -> None:
    base = small()
    model = with_adapter(base)
    before = digest(model)
    callbacks = (MacDropCallback(massive(base), "constant:0.5"), Failing(fault))
    trainer = trainer_of(tmp_path, *callbacks, model=model)
    with pytest.raises(fault):
        trainer.train()
    assert digest(model) != before  # Trainer tells callbacks nothing: this is what guard is for
    with pytest.raises(fault), guard(trainer):
        trainer.train()
    assert digest(model) == before


def test_training_again_after_a_failure_starts_from_the_pretrained_rows(tmp_path: Path) -> None:
    base = small()
    model = with_adapter(base)
    before, callback = digest(model), MacDropCallback(massive(base), "constant:0.5")
    failing = Failing(ValueError)
    trainer = trainer_of(tmp_path, callback, failing, model=model)
    with pytest.raises(ValueError, match="in the middle"):
        trainer.train()
    trainer.remove_callback(failing)
    trainer.train()
    assert digest(model) == before


class Evaluating(TrainerCallback):
    """Looks at the weights at the end of a step, before callbacks given after it are told of that."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        self.seen.append(digest(kwargs["model"]))


def test_the_order_of_callbacks_does_not_matter_to_who_looks_at_the_end_of_a_step(tmp_path: Path) -> None:
    base = small()
    model = with_adapter(base)
    before, first, last = digest(model), Evaluating(), Evaluating()
    trainer_of(tmp_path, first, MacDropCallback(massive(base), "constant:0.5"), last, model=model).train()
    assert first.seen == last.seen == [before] * 4


class Recording(TrainerCallback):
    """As TensorBoard's callback does, takes what is logged; Trainer puts such ones before those it is given."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.seen += [logs["macdrop_p"]] if "loss" in logs else []


def test_under_guard_p_reaches_the_reports_that_come_first(tmp_path: Path) -> None:
    base = small()
    recording = Recording()
    trainer = trainer_of(tmp_path, recording, MacDropCallback(massive(base), "step:0.8"), model=with_adapter(base))
    with guard(trainer):
        trainer.train()
    assert recording.seen == pytest.approx([0.6, 0.4, 0.2, 0.0])


class OutOfMemory(TrainerCallback):
    """In the middle of the first step, once."""

    raised = False

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        if not self.raised:
            self.raised = True
            raise RuntimeError("CUDA out of memory. Tried to allocate everything")


def test_a_smaller_batch_found_by_trainer_starts_from_the_pretrained_rows(tmp_path: Path) -> None:
    base = small()
    model = with_adapter(base)
    before, callback, failing = digest(model), MacDropCallback(massive(base), "epoch-after:0.9"), OutOfMemory()
    trainer = trainer_of(
        tmp_path,
        callback,
        failing,
        model=model,
        auto_find_batch_size=True,
        per_device_train_batch_size=2,
        num_train_epochs=2,
        max_steps=-1,
    )
    trainer.train()
    assert failing.raised
    assert digest(model) == before
    assert callback.engine is not None
    assert list(callback.engine.history.values()) == pytest.approx([0.45] * 4 + [0.0] * 4)  # twice the steps there were


def test_a_failed_trainer_leaves_nothing_to_another_with_a_callback_of_its_own(tmp_path: Path) -> None:
    base = small()
    model = with_adapter(base)
    before, callback = digest(model), MacDropCallback(massive(base), "constant:0.5")
    with pytest.raises(ValueError, match="in the middle"):
        trainer_of(tmp_path, callback, Failing(ValueError), model=model).train()
    assert digest(model) != before
    trainer_of(tmp_path, MacDropCallback(massive(base), "constant:0.5"), model=model).train()
    assert digest(model) == before
    trainer_of(tmp_path, callback, model=model).train()  # used again, with another trainer
    assert digest(model) == before


def test_two_callbacks_for_the_same_rows_are_refused(tmp_path: Path) -> None:
    base = small()
    model = with_adapter(base)
    before = digest(model)
    trainer = trainer_of(tmp_path, MacDropCallback(massive(base)), MacDropCallback(massive(base)), model=model)
    with pytest.raises(BadValue, match="another MacDrop is already dropping"), guard(trainer):
        trainer.train()
    assert digest(model) == before


def test_a_resumed_run_drops_as_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    def run(folder: Path, **options: Any) -> Tensor:
        base = small()
        model = with_adapter(base, lora_dropout=0.1)
        trainer = trainer_of(
            folder, MacDropCallback(massive(base), "step:0.8"), model=model, save_strategy="steps", save_steps=1
        )
        trainer.train(**options)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    whole = run(tmp_path)
    assert torch.equal(run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), whole)


def test_just_in_time_checkpoints_are_refused_with_the_reason(tmp_path: Path) -> None:
    base = small()
    trainer = trainer_of(
        tmp_path, MacDropCallback(massive(base), "step:0.8"), model=with_adapter(base), enable_jit_checkpoint=True
    )
    with pytest.raises(BadValue, match="saves before the optimizer step"):
        trainer.train()


def test_a_model_without_massive_weights_is_refused_at_once() -> None:
    with pytest.raises(BadValue, match="no massive weights"):
        MacDropCallback(None)


def test_the_log_names_the_rows_and_the_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = small()
    with caplog.at_level(logging.INFO, "mwtool"):
        trainer_of(tmp_path, MacDropCallback(massive(base)), model=with_adapter(base)).train()
    assert "MacDrop step:0.8 on model.layers.1.mlp, 5 rows (7, 3, 12, 8, 1), by weights" in caplog.text


# TRL turns checkpointing on under the name that every transformers it supports has
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_macdrop_works_in_trl_unchanged(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="an optional library")
    from datasets import Dataset

    base = small()
    model = with_adapter(base)
    before, watch = digest(model), Watch()
    callback = MacDropCallback(massive(base), "constant:0.5")
    options = {"max_length": 8, "max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    arguments = trl.SFTConfig(str(tmp_path), **options, disable_tqdm=True, bf16=False, dataloader_pin_memory=False)
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": IDS.tolist()}),
        processing_class=tokenizer(),
        callbacks=[callback, watch],
    )
    with guard(trainer):
        trainer.train()
    assert callback.engine is not None
    assert callback.engine.history == {1: 0.5, 2: 0.5}
    assert before not in watch.seen["on_pre_optimizer_step"]
    assert digest(model) == before


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
