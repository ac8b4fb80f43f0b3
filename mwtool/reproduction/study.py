"""A study from its first step to its page: what is left to do, one after the other or side by side, and what failed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue, line_of
from mwtool.evaluation.evaluate import check
from mwtool.evaluation.tasks import parse_tasks
from mwtool.files.atomic_write import check_free, write
from mwtool.files.document import text_of
from mwtool.finetune.checkpointing import LOCK, locked
from mwtool.finetune.data import read_data
from mwtool.finetune.monitor import Step
from mwtool.reproduction import steps
from mwtool.reproduction.commands import (
    SWEEPS,
    evaluate_command,
    sweep_command,
    tasks_of,
    train_command,
)
from mwtool.reproduction.config import PARTS, Part, StudyConfig
from mwtool.reproduction.contents import model_evaluations
from mwtool.reproduction.document import DOCUMENT, PAGE, document_of, earlier
from mwtool.reproduction.page import page_of
from mwtool.reproduction.plot import save_figures
from mwtool.reproduction.runs import Evaluation, Kind, Run, possible, wanted, with_tasks
from mwtool.reproduction.worker import Job, StepFailed, Work, begin, do


@dataclass(slots=True, kw_only=True)
class Study:
    """A study in progress.

    on_note: called with each line for the user. on_step: with each training step, where runs are not side by side.
    in_worker: called first in each worker process. parts: those done now or in earlier calls.
    """

    config: StudyConfig
    command: str | None = None
    on_note: Callable[[str], None] = print
    on_step: Callable[[Step], None] | None = None
    in_worker: Work | None = None
    parts: tuple[Part, ...] = ()
    failures: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Do what is left, and return the document.

        Raises BadValue where the settings are not those of the folder's study or a file cannot be read, OutputError
        where the folder cannot be written. Steps that fail are named in the document, and the others go on.
        """
        self.check()
        with locked(self.config.folder):
            try:
                if steps.scanned(self.config) is None:  # without rows there is nothing else to do: what fails is raised
                    self.on_note("scan")
                    steps.scan(self.config)
                massive = self._massive()
                self._all(self._of_model(massive=massive))
                self._trainings(massive=massive)
            finally:
                document = self.save()
                save_figures(document, self.config.folder, self.config.folder / SWEEPS["texts"])
                self.save()
        return document

    def save(self) -> dict[str, Any]:
        """Write the document, and the page with the figures that are there."""
        folder = self.config.folder
        scan = steps.scanned(self.config)
        document = document_of(self.config, scan, parts=self.parts, failures=self.failures, command=self.command)
        write(folder / DOCUMENT, text_of(document))
        write(folder / PAGE, page_of(document, sorted(path.name for path in folder.glob("*.svg"))))
        return document

    def check(self) -> None:
        """Raise BadValue or OutputError for what can be refused before anything is measured."""
        folder = self.config.folder
        before = earlier(folder)
        done = [] if before is None else before.get("parts", [])
        self.parts = tuple(part for part in PARTS if part in done or part in self.config.only)
        if before is None:
            check_free(folder, besides=[LOCK])
        if before is not None:
            _refuse_other(folder, before["settings"], self.config.settings())
        check(parse_tasks((*tasks_of(self.config, "texts"), *tasks_of(self.config, "tasks"))))
        if not wanted(self.config):
            return
        if self.config.training.data is None:
            raise BadValue(
                "the parts that fine-tune need training records; give --data FILE, or name other parts with --only"
            )
        read_data(self.config.training.data, None)

    def _massive(self) -> bool:
        found = steps.scanned(self.config)
        if found is not None and found["massive"] is None:
            self.on_note(f"{self.config.model} has no massive weights: attacks and MacDrop are skipped")
        return found is not None and found["massive"] is not None

    def _of_model(self, *, massive: bool) -> Iterator[Job]:
        config = self.config
        kinds: tuple[Kind, ...] = ("texts", "tasks")
        for kind in kinds if massive and "figure4" in config.only else ():
            if tasks_of(config, kind) and not (config.folder / SWEEPS[kind]).exists():
                work = partial(steps.sweep, config, kind)
                yield Job(f"attacks beside controls, {kind}", ((sweep_command(config, kind), work),))
        asked = [one for part in config.only for one in model_evaluations(part, config)]
        for kind in kinds:
            attacks = dict.fromkeys(attack for one in asked if one.kind == kind for attack in one.attacks)
            one = Evaluation(kind, tuple(attacks) if massive else ("none",))
            if attacks and not steps.is_measured(config, None, one):
                yield Job(f"the model itself, {kind}", (_evaluation(config, None, one),))

    def _trainings(self, *, massive: bool) -> None:
        if not wanted(self.config):
            return
        runs = possible(wanted(self.config), massive=massive)
        left = [job for run, evaluations in runs.items() if (job := self._of_run(run, evaluations)).steps]
        if self.config.jobs == 1:
            self._all(left)
        elif failed := self._side_by_side(left, self.config.jobs):
            self.on_note(f"{len(failed)} runs failed; they are tried again, one after the other")
            again = {job.name for job in failed}
            self.failures = [one for one in self.failures if one["step"] not in again]
            self._side_by_side(failed, 1)  # memory that was too little for all may be enough for one

    def _of_run(self, run: Run, evaluations: Sequence[Evaluation]) -> Job:
        config = self.config
        todo = [one for one in with_tasks(evaluations, config) if not steps.is_measured(config, run, one)]
        each = [_evaluation(config, run, one) for one in todo]
        if todo and not steps.is_trained(config, run):
            on_step = self.on_step if config.jobs == 1 else None
            each.insert(0, (train_command(config, run), partial(steps.train_run, config, run, on_step)))
        return Job(run.name, tuple(each))

    def _all(self, jobs: Iterator[Job] | Sequence[Job]) -> None:
        """One job after the other; what fails is kept and the next begins."""
        jobs = list(jobs)
        for number, job in enumerate(jobs, 1):
            self.on_note(f"{job.name} ({number} of {len(jobs)})")
            try:
                do(job)
            except StepFailed as fault:
                self._failed(job, fault)
            self.save()

    def _side_by_side(self, jobs: Sequence[Job], at_once: int) -> list[Job]:
        """Each job in a process of its own, `at_once` of them at a time; what fails is returned, the others go on."""
        failed = []
        context = get_context("spawn")
        stop = context.Event()
        with ProcessPoolExecutor(
            at_once, mp_context=context, initializer=begin, initargs=(self.in_worker, stop)
        ) as pool:
            with _ignored_by_children():
                started: dict[Future[None], Job] = {pool.submit(do, job): job for job in jobs}
            try:
                for number, future in enumerate(as_completed(started), 1):
                    fault = future.exception()
                    if fault is None:
                        self.on_note(f"{started[future].name} is done ({number} of {len(jobs)})")
                    elif isinstance(fault, KeyboardInterrupt):
                        raise fault
                    else:
                        self._failed(started[future], fault)
                        failed.append(started[future])
                    self.save()
            except KeyboardInterrupt:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return failed

    def _failed(self, job: Job, fault: BaseException) -> None:
        error = str(fault) if isinstance(fault, StepFailed) else line_of(fault, whole=True)
        command = fault.command if isinstance(fault, StepFailed) else job.steps[0][0]
        self.failures.append({"step": job.name, "command": command, "error": error})
        self.on_note(f"{job.name} failed: {error}")


@contextmanager
def _ignored_by_children() -> Iterator[None]:
    """Processes started inside the block ignore Ctrl-C, until `begin`: they would print where it hit an import."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _evaluation(config: StudyConfig, run: Run | None, one: Evaluation) -> tuple[str, Work]:
    return evaluate_command(config, run, one), partial(steps.evaluate, config, run, one)


def _refuse_other(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in _flat(now).items():
        was = _flat(before).get(name)
        if was != value:
            raise BadValue(
                f"{folder} holds a study with {name} {was!r}, now it is {value!r}: use the same to resume, or another "
                f"folder (-o)"
            )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = value if isinstance(value, dict) else None
        found |= {name: value} if inner is None else {f"{name}.{key}": one for key, one in inner.items()}
    return found
