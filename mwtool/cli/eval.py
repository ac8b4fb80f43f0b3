"""`mwtool eval`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mwtool.cli import options
from mwtool.cli.options import DType, On

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mwtool.evaluation.evaluate import Result
    from mwtool.evaluation.measurement import Options
    from mwtool.evaluation.tasks import Task
    from mwtool.massive import MassiveWeights
    from mwtool.models.load import Loaded
    from mwtool.scan.targets import Choice, Group
    from mwtool.surgery.attack import Attack


class Protocol(StrEnum):
    """How a text becomes windows."""

    bos = "bos"
    bos_4096 = "bos-4096"
    sun_4096 = "sun-4096"
    word = "word"


def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, local folder, PEFT adapter folder, or demo; with --compare several, or earlier result files.",
            show_default="demo",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="ppl:demo|FILE|wikitext2|c4|pg19, mc:FILE.jsonl, cloze:FILE.jsonl, generate:FILE, paper, or a task of "
            "lm-evaluation-harness; repeatable.",
            show_default="ppl:demo",
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="none, zero:K, retain:K or scale:FACTOR:K, with @2+11 for rows of these layers; repeatable.",
            show_default="none",
        ),
    ] = None,
    massive: options.Massive = None,
    event: options.Event = None,
    layer: options.Layers = None,
    indices: options.Indices = None,
    expert: options.Expert = None,
    on: Annotated[On, typer.Option(help="Adapters: attack rows of the base model, or of the sum.")] = On.base,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Several models or result files beside the first."),
    ] = False,
    protocol: Annotated[
        Protocol | None,
        typer.Option(help="How a text is cut.", show_default="sun-4096 for the datasets, else bos"),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a window.", show_default="4096, or what the model has")
    ] = None,
    bos: Annotated[str, typer.Option(help="First token: auto, always, never, or a TOKEN or id.")] = "auto",
    delimiter: Annotated[
        str, typer.Option(help="Between context and continuation in mc: and cloze: files.", show_default="a space")
    ] = " ",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer of generate:, at most.")] = 128,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows, questions or prompts at once.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many of each task.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of few-shot examples and of sampling, where a task does that.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what the file of -o has already.")] = False,
    gguf_file: options.GGUFFile = None,
    revision: options.Revision = None,
    dtype: options.Precision = DType.auto,
    device: options.Device = "cpu",
    device_map: options.Spread = None,
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
    output: options.Output = None,
    config: options.Config = None,
    debug: options.Debug = False,
) -> None:
    """Measure perplexity and zero-shot tasks, on any model or adapter, attacked or not."""
    models = list(dict.fromkeys(model or ["demo"]))
    _usage(models, compare=compare, resume=resume, output=output, of_one=(revision, gguf_file, massive))
    from mwtool.cli.terminal import say_once
    from mwtool.evaluation.evaluate import check
    from mwtool.evaluation.measurement import Options
    from mwtool.evaluation.tasks import parse_tasks
    from mwtool.files.atomic_write import check_writable
    from mwtool.surgery.attack import parse_attack

    say_once()
    measuring = Options(
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        protocol=None if protocol is None else protocol.value,
        window=window,
        bos=bos,
        delimiter=delimiter,
        new_tokens=new_tokens,
    )
    attacks = tuple(dict.fromkeys(map(parse_attack, attack or ["none"])))
    if output is not None:
        check_writable(output)
    opening = options.opening(
        on=on,
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        gguf_file=gguf_file,
    )
    tasks = parse_tasks(task or ["ppl:demo"])
    check(tasks)
    choice = options.chosen(massive=massive, event=event, layer=layer, expert=expert, indices=indices)
    run = _Run(tasks, attacks, choice, measuring, opening, output, compare, resume)
    run.measure(models)
    if json:
        sys.stdout.write(run.text())
        return
    from mwtool.cli.terminal import report_console
    from mwtool.evaluation.document import rows_of
    from mwtool.evaluation.report import eval_report

    report_console().print(eval_report(rows_of(run.documents, run.names)))


def _usage(
    models: Sequence[str],
    *,
    compare: bool,
    resume: bool,
    output: Path | None,
    of_one: tuple[str | Path | None, ...],
) -> None:
    if len(models) > 1 and not compare:
        raise typer.BadParameter(f"one MODEL is evaluated, {len(models)} are given; --compare puts them side by side")
    if len(models) > 1 and any(value is not None for value in of_one):
        raise typer.BadParameter(
            "--revision, --gguf-file and --massive belong to one MODEL; evaluate them one by one with -o FILE"
        )
    if resume and output is None:
        raise typer.BadParameter("--resume goes on from the file of -o; say which")


@dataclass(slots=True)
class _Run:
    """What was asked for, and the documents so far: of each model in turn, or read from a result file."""

    tasks: Sequence[Task]
    attacks: Sequence[Attack]
    choice: Choice
    measuring: Options
    opening: dict[str, Any]
    output: Path | None
    compare: bool
    resume: bool
    documents: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    earlier: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, models: Sequence[str]) -> None:
        from mwtool.evaluation.document import read_documents

        if self.resume and self.output is not None and self.output.exists():
            self.earlier = read_documents(self.output)
        files = {name: read_documents(Path(name)) for name in models if self.compare and Path(name).is_file()}
        for name in models:
            if name not in files:
                self._evaluate(name)
                continue
            for document in files[name]:
                self.documents.append(document)
                self.names.append(
                    Path(name).stem if len(files[name]) == 1 else f"{Path(name).stem}: {document['model']}"
                )
        self._write()

    def text(self) -> str:
        from mwtool.cli.terminal import command_line
        from mwtool.evaluation.document import comparison_document, text_of_results

        document = (
            comparison_document(self.documents, self.names, command_line()) if self.compare else self.documents[0]
        )
        return text_of_results(document)

    def _write(self) -> None:
        from mwtool.files.atomic_write import write

        if self.output is not None:
            write(self.output, self.text())

    def _evaluate(self, model: str) -> None:
        from mwtool.cli.terminal import note, note_all, run_progress
        from mwtool.evaluation.document import earlier_notes, earlier_results
        from mwtool.evaluation.evaluate import evaluate
        from mwtool.models.load import load

        loaded = load(model, **self.opening)
        massive, groups, notes = self._rows(loaded)
        note_all((*loaded.notes, *notes))
        document = self._document(loaded, massive, groups)
        earlier = (
            []
            if self.output is None
            else earlier_results(self.output, document([], notes, complete=False), self.earlier)
        )
        if earlier:
            notes[:0] = earlier_notes(document([], notes, complete=False), self.earlier)
        results: list[Result] = list(earlier)
        self.documents.append(document(results, notes, complete=False))
        self.names.append(model)

        def on_results(found: Sequence[Result]) -> None:
            results.extend(found)
            self.documents[-1] = document(results, notes, complete=False)
            self._write()

        def on_note(line: str) -> None:
            notes.append(line)
            note(line)

        done = {(str(one.attack), one.measured.task) for one in earlier}
        with run_progress() as on_task:
            evaluate(
                loaded,
                massive,
                self.attacks,
                self.tasks,
                self.measuring,
                on_results=on_results,
                on_task=on_task,
                on_note=on_note,
                done=done,
                groups=groups,
            )
        self.documents[-1] = document(results, notes, complete=True)

    def _rows(self, loaded: Loaded) -> tuple[MassiveWeights | None, dict[tuple[int, ...], Group], list[str]]:
        """The massive weights, where an attack needs them, and the rows of layers that are named; one scan for all."""
        from functools import cache, partial

        from mwtool.scan.loaded import massive_for, scan_loaded
        from mwtool.scan.scanner import Settings
        from mwtool.scan.targets import Choice, find_targets

        wanted: dict[tuple[int, ...], int] = {}
        for attack in self.attacks:
            if not attack.idle:
                wanted[attack.layers] = max(attack.k, 1, wanted.get(attack.layers, 0))
        settings = Settings(k=max(wanted.values(), default=1), bos=self.measuring.bos)
        massive: MassiveWeights | None = None
        notes: dict[str, None] = {}
        groups: dict[tuple[int, ...], Group] = {}
        scanned = cache(partial(scan_loaded, loaded))
        for layers, k in wanted.items():
            if not layers and self.choice == Choice(file=self.choice.file):
                massive, said = massive_for(loaded, self.choice.file, settings)
            else:
                choice = Choice(layers=layers) if layers else self.choice
                (groups[layers],), said = find_targets(loaded, choice, k, settings, scanned=scanned)
            notes |= dict.fromkeys(said)
        return massive, groups, list(notes)

    def _document(
        self, loaded: Loaded, massive: MassiveWeights | None, groups: dict[tuple[int, ...], Group]
    ) -> Callable[..., dict[str, Any]]:
        from mwtool.cli.terminal import command_line
        from mwtool.evaluation.document import eval_document

        def made(results: Sequence[Result], notes: Sequence[str], *, complete: bool) -> dict[str, Any]:
            return eval_document(
                loaded,
                self.measuring,
                attacks=self.attacks,
                tasks=[str(task) for task in self.tasks],
                results=results,
                massive=massive,
                groups=groups,
                notes=notes,
                command=command_line(),
                complete=complete,
            )

        return made
