"""The steps of a study: a scan, a sweep of attacks, a fine-tuning run, an evaluation; each leaves its document.

They are what the commands do, by the same functions. A step whose document is there already is done.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mwtool.ablation.check import check_scan
from mwtool.ablation.document import ablate_document
from mwtool.ablation.sweep import Sweep, ablate
from mwtool.errors import BadValue
from mwtool.evaluation.config import EvalConfig, Options
from mwtool.evaluation.document import read_documents
from mwtool.evaluation.run import evaluate_models
from mwtool.evaluation.tasks import parse_tasks
from mwtool.files.atomic_write import write
from mwtool.files.document import text_of
from mwtool.files.text import read_json
from mwtool.finetune.artifacts import leave
from mwtool.finetune.batch_size import fitted
from mwtool.finetune.checkpointing import date_of, locked, newest, settings_of
from mwtool.finetune.config import Asked
from mwtool.finetune.document import RECORD, finetune_document
from mwtool.finetune.monitor import Step
from mwtool.finetune.plan import make_plan
from mwtool.finetune.trainer import Telling, train, with_adapter
from mwtool.models.load import load
from mwtool.models.locate import locate
from mwtool.reproduction.commands import (
    SCAN,
    SWEEPS,
    evaluate_command,
    folder_of,
    model_of,
    scan_command,
    sweep_command,
    sweep_ks,
    tasks_of,
    train_command,
)
from mwtool.reproduction.config import KS, PLAIN, StudyConfig
from mwtool.reproduction.runs import Evaluation, Kind, Run
from mwtool.scan.document import scan_document
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.settings import Choice, Settings
from mwtool.scan.targets import find_targets
from mwtool.surgery.attack import parse_attack

OnStep = Callable[[Step], None]


def scan(config: StudyConfig) -> None:
    """Scan the model and check the prediction on the first text."""
    opening = config.loading
    found = scan_checkpoint(
        config.model,
        Settings(k=max(KS)),
        revision=opening.revision,
        dtype=opening.dtype,
        device=opening.device,
        trust_remote_code=opening.trust_remote_code,
        gguf_file=opening.gguf_file,
    )
    checked = None
    texts = list(config.measuring.texts.values())
    if found.events and texts:
        with suppress(BadValue):  # a text that is too short for a check
            checked = check_scan(load(config.model, **asdict(opening)), found, texts[0]).document()
    write(config.folder / SCAN, text_of(scan_document(found, scan_command(config), checked)))


def scanned(config: StudyConfig) -> dict[str, Any] | None:
    """The document of the scan; None where there is none yet."""
    path = config.folder / SCAN
    return dict(read_json(path)) if path.exists() else None


def sweep(config: StudyConfig, kind: Kind) -> None:
    """Zero and retain the rows on the texts or tasks, for each k, beside controls."""
    loaded = load(config.model, **asdict(config.loading))
    groups, notes = find_targets(loaded, Choice(file=config.folder / SCAN), max(KS), Settings())
    wanted = Sweep(ks=sweep_ks(kind), draws=config.measuring.draws)
    found = ablate(loaded, groups, parse_tasks(tasks_of(config, kind)), wanted, options_of(config, kind))
    found = replace(found, notes=(*notes, *found.notes))
    document = ablate_document(loaded, found, command=sweep_command(config, kind))
    write(config.folder / SWEEPS[kind], text_of(document))
    free()


def options_of(config: StudyConfig, kind: str) -> Options:
    """How texts or tasks are measured."""
    measuring = config.measuring
    if kind == "tasks":
        return Options(batch_size=measuring.batch_size, limit=measuring.limit)
    return Options(batch_size=measuring.batch_size, limit=measuring.windows, window=measuring.window)


def is_trained(config: StudyConfig, run: Run) -> bool:
    """Whether the run has ended."""
    return (config.folder / run.name / RECORD).exists()


def train_run(config: StudyConfig, run: Run, on_step: OnStep | None = None) -> None:
    """Train one adapter, from its newest checkpoint if it was begun. Raises KeyboardInterrupt after a signal."""
    folder, opening = config.folder / run.name, config.loading
    if config.training.data is None:
        raise BadValue("fine-tuning runs need training records; give --data FILE")
    recipe = run.recipe(config)
    with locked(folder):
        source = locate(
            config.model,
            opening.revision,
            trust_remote_code=opening.trust_remote_code,
            gguf_file=opening.gguf_file,
        )
        rows = None if run.schedule == PLAIN else config.folder / SCAN
        asked = Asked(data=config.training.data, massive=rows, date=date_of(folder))
        plan = make_plan(source, recipe.with_found(settings_of(folder)), asked)
        begun, _ = newest(folder, plan.settings())
        model = with_adapter(plan.source, plan.recipe, opening.device)
        plan = replace(plan, recipe=fitted(model, plan.train, plan.recipe))
        trained = train(
            model,
            (plan.train, plan.held),
            plan.places,
            plan.recipe,
            folder,
            settings=plan.settings(),
            resume=begun,
            telling=Telling(on_step=on_step),
        )
        if trained.stopped_by is not None:
            raise KeyboardInterrupt
        document = finetune_document(plan, trained, device=opening.device, command=train_command(config, run))
        leave(document, trained, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # of no use once the record is there, and larger than the adapter
    free()


def evaluate(config: StudyConfig, run: Run | None, one: Evaluation) -> None:
    """Measure one evaluation of a run's adapter, or of the model itself; what its file holds is not measured again."""
    output = folder_of(config, run) / one.file
    needs_rows = any(not parse_attack(attack).idle for attack in one.attacks)
    asked = EvalConfig(
        tasks=tasks_of(config, one.kind),
        attacks=one.attacks,
        choice=Choice(file=config.folder / SCAN) if needs_rows else Choice(),
        measuring=options_of(config, one.kind),
        loading=replace(config.loading, on=one.on, revision=None, gguf_file=None) if run else config.loading,
    )
    command = evaluate_command(config, run, one)
    evaluate_models([model_of(config, run)], asked, output=output, resume=output.exists(), command=command)
    free()


def is_measured(config: StudyConfig, run: Run | None, one: Evaluation) -> bool:
    """Whether the document of an evaluation has every task under every attack."""
    wanted = {(attack, task) for attack in one.attacks for task in _tasks(tasks_of(config, one.kind))}
    return wanted <= {(result["attack"], result["task"]) for result in results(folder_of(config, run) / one.file)}


@cache
def _tasks(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(str, parse_tasks(names)))


def results(path: Path) -> list[dict[str, Any]]:
    """The results in an evaluation's document; none where it does not exist."""
    return [result for document in evaluations(path) for result in document["results"]]


def evaluations(path: Path) -> list[dict[str, Any]]:
    """The documents in the file of an evaluation; none where it does not exist."""
    return read_documents(path) if path.exists() else []


def free() -> None:
    """Give back the memory of a model that is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
