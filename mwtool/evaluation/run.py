"""Evaluate models one after another, resumably, and compare them with each other and with saved results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue
from mwtool.evaluation.comparison import Entry
from mwtool.evaluation.compiled import refuse_idle
from mwtool.evaluation.config import EvalConfig
from mwtool.evaluation.document import (
    comparison_document,
    earlier_notes,
    earlier_results,
    entries_of,
    eval_document,
    read_documents,
    text_of_results,
)
from mwtool.evaluation.evaluate import OnTask, Result, check, evaluate
from mwtool.evaluation.tasks import Task, parse_tasks
from mwtool.files.atomic_write import check_writable, write
from mwtool.files.tabular import frame_of, html_of
from mwtool.massive import MassiveWeights
from mwtool.models.load import Loaded, load
from mwtool.scan.loaded import massive_for, scan_loaded
from mwtool.scan.settings import Choice, Settings
from mwtool.scan.targets import Group, find_targets
from mwtool.surgery.attack import Attack, parse_attack

Groups = dict[tuple[int, ...], Group]
"""By the layers that an attack names, the rows it acts on."""


@dataclass(frozen=True, slots=True, repr=False)
class Evaluations:
    """What was measured on each model in turn, or read from a result file.

    documents: one of schema mwtool.eval/1 for each model. names: what each is called beside the others.
    """

    documents: tuple[dict[str, Any], ...]
    names: tuple[str, ...]

    @property
    def entries(self) -> list[Entry]:
        """Every metric of every model, as `eval_report` shows them."""
        return entries_of(self.documents, self.names)

    def compared(self, command: str | None = None) -> dict[str, Any]:
        """One document of schema mwtool.comparison/1: every metric compared with the first of its kind."""
        return comparison_document(self.documents, self.names, command)

    def to_dict(self) -> dict[str, Any]:
        """The document of the model, or of the comparison where there are several, as `mwtool eval --json` prints."""
        return self.compared() if len(self.documents) > 1 else self.documents[0]

    def to_frame(self) -> Any:
        """A pandas DataFrame with one line a metric. Raises BadValue where pandas is not installed."""
        return frame_of(self._records())

    def __repr__(self) -> str:
        """One line: the models and how much was measured."""
        return f"Evaluations({list(self.names)}, metrics={len(self.entries)})"

    def _repr_html_(self) -> str:
        return html_of(repr(self), self._records())

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "model": entry.model,
                "attack": entry.attack,
                "task": entry.measured.task,
                "part": entry.measured.part,
                "metric": entry.measured.metric,
                "value": entry.measured.value,
                "stderr": entry.measured.stderr,
                "n": entry.measured.n,
            }
            for entry in self.entries
        ]


def evaluate_models(
    models: Sequence[str],
    config: EvalConfig | None = None,
    *,
    output: Path | None = None,
    compare: bool = False,
    resume: bool = False,
    command: str | None = None,
    on_note: Callable[[str], None] | None = None,
    on_task: OnTask | None = None,
) -> Evaluations:
    """Measure every task under every attack on each model.

    models: Hub ids, folders, PEFT adapter folders or `demo`; with `compare` also result files, which are read.
    output: where the document is kept up to date, written after every task. compare: what is written there is a
    comparison of all models. resume: leave out what `output` already holds.
    command: recorded in the documents. on_note: called with each decision made on the user's behalf.

    Raises BadValue where settings contradict each other, tasks or attacks are not understood, or `output` holds
    results made under other settings; OutputError where `output` cannot be written; ModelNotFound and its like where
    a model cannot be opened. Everything that can be checked is checked before the first model is opened.
    """
    config = config or EvalConfig()
    check_models(models, config, compare=compare)
    if resume and output is None:
        raise BadValue("resume needs an output file, which holds the results to continue from")
    attacks = tuple(dict.fromkeys(map(parse_attack, config.attacks)))
    if output is not None:
        check_writable(output)
    tasks = parse_tasks(config.tasks)
    check(tasks)
    refuse_idle(tasks, compiled=config.measuring.compile)
    earlier = read_documents(output) if resume and output is not None and output.exists() else []
    saved = {name: read_documents(Path(name)) for name in models if compare and Path(name).is_file()}
    run = _Run(
        config=config,
        tasks=tasks,
        attacks=attacks,
        output=output,
        compare=compare,
        command=command,
        on_note=on_note or _ignored,
        on_task=on_task,
    )
    for name in models:
        if name in saved:
            run.add_saved(Path(name), saved[name])
        else:
            run.evaluate(name, earlier)
    run.write()
    return Evaluations(tuple(run.documents), tuple(run.names))


def check_models(models: Sequence[str], config: EvalConfig, *, compare: bool) -> None:
    """Raises BadValue where there are too many or too few models for what is asked."""
    if not models:
        raise BadValue("no model is given; expected one, or several with compare")
    if len(models) > 1 and not compare:
        raise BadValue(f"{len(models)} models are given; expected one, or compare to show them side by side")
    of_one = (config.loading.revision, config.loading.gguf_file, config.choice.file)
    if len(models) > 1 and any(value is not None for value in of_one):
        raise BadValue(
            "a revision, a GGUF file and a saved scan belong to one model; evaluate each, then compare the results"
        )


def _ignored(_: str) -> None:
    pass


def rows_for(
    loaded: Loaded, attacks: Sequence[Attack], config: EvalConfig
) -> tuple[MassiveWeights | None, Groups, list[str]]:
    """The massive weights, where an attack needs them, and the rows of layers that are named; one scan for all.

    And what the user should know about them. Raises MwtoolError where rows do not fit the model.
    """
    wanted: dict[tuple[int, ...], int] = {}
    for attack in attacks:
        if not attack.idle:
            wanted[attack.layers] = max(attack.k, 1, wanted.get(attack.layers, 0))
    settings = Settings(k=max(wanted.values(), default=1), bos=config.measuring.bos)
    massive: MassiveWeights | None = None
    notes: dict[str, None] = {}
    groups: Groups = {}
    scanned = cache(partial(scan_loaded, loaded))
    for layers, k in wanted.items():
        if not layers and config.choice == Choice(file=config.choice.file):
            massive, said = massive_for(loaded, config.choice.file, settings)
        else:
            choice = Choice(layers=layers) if layers else config.choice
            (groups[layers],), said = find_targets(loaded, choice, k, settings, scanned=scanned)
        notes |= dict.fromkeys(said)
    return massive, groups, list(notes)


@dataclass(slots=True, kw_only=True)
class _Run:
    """What was asked for, and the documents so far."""

    config: EvalConfig
    tasks: Sequence[Task]
    attacks: Sequence[Attack]
    output: Path | None
    compare: bool
    command: str | None
    on_note: Callable[[str], None]
    on_task: OnTask | None
    documents: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add_saved(self, path: Path, documents: Sequence[dict[str, Any]]) -> None:
        """Put the evaluations of a result file beside the others."""
        for document in documents:
            self.documents.append(document)
            self.names.append(path.stem if len(documents) == 1 else f"{path.stem}: {document['model']}")

    def evaluate(self, model: str, saved: Sequence[dict[str, Any]]) -> None:
        """Measure one model; `saved` may hold earlier results of it, which are kept."""
        loaded = load(model, **asdict(self.config.loading))
        massive, groups, notes = rows_for(loaded, self.attacks, self.config)
        for line in dict.fromkeys((*loaded.notes, *notes)):
            self.on_note(line)
        before = []
        if self.output is not None:
            now = self._document(loaded, massive, groups, [], notes, complete=False)
            before = earlier_results(self.output, now, saved)
            notes[:0] = earlier_notes(now, saved) if before else ()
        results: list[Result] = list(before)
        self.documents.append(self._document(loaded, massive, groups, results, notes, complete=False))
        self.names.append(model)

        def on_results(found: Sequence[Result]) -> None:
            results.extend(found)
            self.documents[-1] = self._document(loaded, massive, groups, results, notes, complete=False)
            self.write()

        def on_note(line: str) -> None:
            notes.append(line)
            self.on_note(line)

        evaluate(
            loaded,
            massive,
            self.attacks,
            self.tasks,
            self.config.measuring,
            on_results=on_results,
            on_task=self.on_task,
            on_note=on_note,
            groups=groups,
            done={(str(one.attack), one.measured.task) for one in before},
        )
        self.documents[-1] = self._document(loaded, massive, groups, results, notes, complete=True)

    def write(self) -> None:
        """Bring the output file up to date."""
        if self.output is None:
            return
        so_far = Evaluations(tuple(self.documents), tuple(self.names))
        document = so_far.compared(self.command) if self.compare else self.documents[0]
        write(self.output, text_of_results(document))

    def _document(
        self,
        loaded: Loaded,
        massive: MassiveWeights | None,
        groups: Groups,
        results: Sequence[Result],
        notes: Sequence[str],
        *,
        complete: bool,
    ) -> dict[str, Any]:
        return eval_document(
            loaded,
            self.config.measuring,
            attacks=self.attacks,
            tasks=[str(task) for task in self.tasks],
            results=results,
            massive=massive,
            groups=groups,
            notes=notes,
            command=self.command,
            complete=complete,
        )
