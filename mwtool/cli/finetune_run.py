"""What `mwtool finetune` does once its options are read: plan, say so, find what fits, train, leave the results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from mwtool.cli import options, process
from mwtool.cli.dry_run import refuse_alone, since_start
from mwtool.finetune.config import AUTO, Asked, Recipe
from mwtool.macdrop.curriculum import Curriculum
from mwtool.scan.settings import Choice

if TYPE_CHECKING:
    from mwtool.cli.outputs import Outputs
    from mwtool.finetune.plan import Plan
    from mwtool.models.hub_upload import Destination
    from mwtool.models.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as it was asked for.

    locating: finds the model. output: its folder; None: only the plan is wanted. reporting: fields of `Telling`.
    outputs: what is drawn of the result. push: where on the Hub the adapter is uploaded to; None: nowhere.
    """

    locating: Callable[[], Source]
    recipe: Recipe
    asked: Asked
    output: Path | None
    device: str
    reporting: dict[str, Any]
    outputs: Outputs
    resume: bool
    merge: bool
    push: Destination | None
    json: bool

    def start(self, *, trial: bool = False) -> None:
        """Show the plan, with what a trial finds if one is wanted; if there is a folder, train into it."""
        from mwtool.cli.terminal import quiet_libraries

        quiet_libraries()
        if self.output is None:
            _show_plan(self._planned(self.recipe, self.asked), self.device, trial=trial, json=self.json)
            return
        from mwtool.finetune.checkpointing import date_of, locked, settings_of

        with locked(self.output) if process.first() else nullcontext():
            if _ended(self.output, self.outputs, resume=self.resume):
                return
            recipe, asked = self.recipe, self.asked
            if self.resume:
                recipe = recipe.with_found(settings_of(self.output))
                asked = replace(asked, date=date_of(self.output))
            plan = self._planned(recipe, asked)
            self._train(plan, self.output)

    def _planned(self, recipe: Recipe, asked: Asked) -> Plan:
        from mwtool.finetune.batch_size import without_trial
        from mwtool.finetune.kernels import refuse_on

        refuse_on(self.device, recipe)
        plan = _planned(self.locating(), recipe, asked)
        if self.device.startswith("cuda"):
            return plan
        return replace(plan, recipe=without_trial(plan.recipe, len(plan.train), plan.processes))

    def _train(self, plan: Plan, folder: Path) -> None:
        """Train, and save the results."""
        from mwtool.cli.terminal import command_line, note, note_all, step_progress
        from mwtool.files.document import text_of
        from mwtool.finetune.artifacts import leave
        from mwtool.finetune.checkpointing import newest
        from mwtool.finetune.document import finetune_document
        from mwtool.finetune.trainer import Telling, check_loggers, train, with_adapter

        check_loggers(self.reporting["loggers"])
        found, notes = newest(folder, plan.settings()) if self.resume else (None, ())
        note_all(notes)
        if self.resume:
            none = f"{folder} has no complete checkpoint; starting at step 1"
            note(f"resuming from {found.folder}" if found else none)
        model = with_adapter(plan.source, plan.recipe, self.device)
        plan = _fitted(plan, model)
        _tell_plan(plan)
        with step_progress() as on_step:
            trained = train(
                model,
                (plan.train, plan.held),
                plan.places,
                plan.recipe,
                folder,
                settings=plan.settings(),
                resume=found,
                telling=Telling(**self.reporting, on_step=on_step),
                processes=plan.processes,
            )
        if trained.stopped_by is not None:
            note(
                f"stopped after step {trained.step} of {trained.steps}; a checkpoint is saved, add --resume to continue"
            )
            raise typer.Exit(128 + trained.stopped_by)
        if process.first():
            document = finetune_document(plan, trained, device=self.device, command=command_line())
            leave(document, trained, folder, merge=self.merge)
            _show(document, folder, json=self.json)
            self.outputs.draw(text_of(document))
            if self.push is not None:
                _push(folder, self.push)
            note(f"measure it with: {measuring(folder, plan)}")
        process.end()


def locating(name: str, revision: str | None, **options: Any) -> Source:
    """As `mwtool.models.locate.locate`, which imports what `--help` does without."""
    from mwtool.models.locate import locate

    return locate(name, revision, **options)


def pushing(repo: str | None, *, private: bool, dry_run: bool) -> Destination | None:
    """Where on the Hub the adapter goes: a repository that the first process makes. Raises WrongUsage."""
    if dry_run and repo is not None:
        raise options.WrongUsage("--dry-run trains nothing that --push-to-hub could upload; leave one of them out")
    return options.hub_destination(repo, "model", private=private) if process.first() else None


def _push(folder: Path, destination: Destination) -> None:
    """Upload the adapter, its card, its record and its figure; neither checkpoints nor the merged model."""
    from mwtool.cli.terminal import note
    from mwtool.finetune.artifacts import PUBLISHED
    from mwtool.models.hub_upload import upload_folder

    upload_folder(destination, folder, PUBLISHED, "Adapter trained by mwtool")
    note(f"the adapter is at {destination.url}")


def batch_of(text: str) -> int | Literal["auto"]:
    """The value of --batch-size. Raises WrongUsage."""
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or not 0 < int(text) <= 2**31:
        raise options.WrongUsage(f"--batch-size {text!r}: expected a number of sequences, from 1, or auto")
    return int(text)


def measuring(folder: Path, plan: Plan) -> str:
    """The command that shows what was reached: the adapter's perplexity, and with the rows of the base model zeroed."""
    attacks = ["--attack", "none", *(["--attack", f"zero:{min(3, plan.recipe.curriculum.k)}"] if plan.places else [])]
    trust = ["--trust-remote-code"] if plan.source.trust_remote_code else []
    return shlex.join(["mwtool", "eval", str(folder), *attacks, *(["--on", "base"] if plan.places else []), *trust])


def needed(data: str | None, output: Path | None, *, dry_run: bool) -> str:
    """The data, which is required, as is an output folder to train. Raises WrongUsage."""
    if data is None:
        raise options.WrongUsage("--data DATA is required: the records to train on")
    if output is None and not dry_run:
        raise options.WrongUsage("--output-dir DIR (or -o) is required: where to save the adapter; or add --dry-run")
    return data


def drawn(
    plot: Path | None, report: Path | None, table: Path | None, *, dry_run: bool, trial: bool, show_curriculum: bool
) -> Outputs:
    """The files to draw, which can be written. Raises WrongUsage where there will be nothing to draw."""
    from mwtool.cli.outputs import Outputs

    refuse_alone(trial=trial, dry_run=dry_run)
    if dry_run and (plot, report, table) != (None, None, None):
        raise options.WrongUsage("--dry-run trains nothing that --plot, --report or --table could show; leave them out")
    if show_curriculum and (report, table) != (None, None):
        name = "--report" if report is not None else "--table"
        raise options.WrongUsage(f"{name} shows a run, and --show-curriculum makes none; leave out one of them")
    outputs = Outputs(plot=plot, report=report, table=table)
    outputs.check()
    return outputs


def without_layers(choice: Choice, curriculum: Curriculum, macdrop: str) -> Choice:
    """The rows chosen by options other than --massive, if the curriculum names no layers. Raises WrongUsage."""
    own = replace(choice, file=None)
    if curriculum.layers and own != Choice():
        raise options.WrongUsage(f"{macdrop} names layers; leave out --layer, --event, --expert and --indices")
    return own


def _ended(folder: Path, outputs: Outputs, *, resume: bool) -> bool:
    """Whether the run in `folder` has finished, which is drawn then.

    Raises OutputError where a new run needs another folder.
    """
    from mwtool.cli.terminal import note
    from mwtool.errors import OutputError
    from mwtool.files.atomic_write import check_free
    from mwtool.finetune.checkpointing import LOCK
    from mwtool.finetune.document import RECORD, read_record

    if resume and (folder / RECORD).exists():
        read_record(folder / RECORD)
        note(f"{folder} holds a finished run; there is nothing to resume")
        outputs.draw((folder / RECORD).read_text(encoding="utf-8"))
        return True
    if resume or not process.first():  # the first process looks, before it fills the folder
        return False
    try:
        check_free(folder, besides=[LOCK])
    except OutputError as fault:
        advice = ", or continue the run in it with --resume" if folder.is_dir() else ""
        raise OutputError(f"{fault}{advice}") from fault
    return False


def _planned(source: Source, recipe: Recipe, asked: Asked) -> Plan:
    from mwtool.cli.terminal import layer_progress, note_all
    from mwtool.finetune.document import check_plan
    from mwtool.finetune.plan import make_plan
    from mwtool.models.weight_files import find_weights

    note_all(source.notes)
    with layer_progress() as bar:
        plan = make_plan(source, recipe, asked, processes=process.count(), on_layer=bar.on_layer)
    check_plan(plan)
    find_weights(source)  # files that cannot be are said before anything else
    note_all(plan.notes)
    return plan


def _show_plan(plan: Plan, device: str, *, trial: bool, json: bool) -> None:
    from mwtool.cli.terminal import note_all, report_console
    from mwtool.files.document import text_of
    from mwtool.finetune.document import plan_document
    from mwtool.finetune.memory import footprint
    from mwtool.finetune.plan import few_steps
    from mwtool.finetune.report import plan_report
    from mwtool.finetune.trial import tried

    before, found = since_start(), None
    if trial:
        found = tried(plan, device)
        plan = replace(plan, recipe=found.recipe)
    needed = footprint(plan, device)
    if json:
        sys.stdout.write(text_of(plan_document(plan, needed, found, before=before, device=device)))
        return
    note_all(few_steps(plan))
    console = report_console()
    console.print(plan_report(plan, needed, console.width, trial=found, before=before))


def _tell_plan(plan: Plan) -> None:
    """What is about to run, before it does: on stderr, as everything that is not the result."""
    from mwtool.cli.terminal import note_all, tell
    from mwtool.finetune.memory import footprint
    from mwtool.finetune.plan import few_steps
    from mwtool.finetune.report import plan_table

    tell(plan_table(plan, footprint(plan)))
    note_all(few_steps(plan))


def _fitted(plan: Plan, model: Any) -> Plan:
    """The plan with what trial steps find."""
    from mwtool.cli.terminal import note
    from mwtool.finetune.batch_size import fitted
    from mwtool.finetune.report import at_once_line

    recipe = fitted(model, plan.train, plan.recipe, processes=plan.processes)
    if recipe != plan.recipe:
        note(f"found by trial steps: {at_once_line(recipe)}")
    return replace(plan, recipe=recipe)


def _show(document: dict[str, Any], folder: Path, *, json: bool) -> None:
    from mwtool.cli.terminal import report_console
    from mwtool.files.document import text_of
    from mwtool.finetune.report import outcome_report

    if json:
        sys.stdout.write(text_of(document))
    else:
        report_console().print(outcome_report(document, str(folder)))
