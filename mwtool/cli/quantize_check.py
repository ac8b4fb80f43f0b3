"""`mwtool quantize-check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mwtool.cli import dry_run as forecasts
from mwtool.cli import options
from mwtool.cli.command import Command
from mwtool.cli.commands import single
from mwtool.cli.options import numbers
from mwtool.evaluation.config import Options
from mwtool.models.load_options import LoadOptions
from mwtool.quantization.config import QuantizeConfig
from mwtool.quantization.rounding import Levels, parse_bits, parse_group
from mwtool.scan.settings import Settings

if TYPE_CHECKING:
    from mwtool.quantization.check import QuantizeCheck

DEFAULTS, LOADING = QuantizeConfig(), LoadOptions()
EXAMPLES = """\
mwtool quantize-check                    # the bundled model
mwtool quantize-check ./model --bits 4,3 --group 128
mwtool quantize-check ./model --bits 4 --task ppl:wikitext2 --limit 64
"""


def quantize_check(
    model: options.Model = "demo",
    bits: Annotated[
        str, typer.Option(metavar="N,N,...", help="Bits of a weight, 2 to 8; each number is tried in turn.")
    ] = ",".join(map(str, DEFAULTS.bits)),
    group: Annotated[
        str, typer.Option(metavar="N", help="Input weights that share a scale, or row for a whole row.")
    ] = str(DEFAULTS.group),
    levels: Annotated[
        Levels, typer.Option(help="Around zero, shifted by a zero point, from a group's minimum up, or NF4.")
    ] = DEFAULTS.levels,
    k: Annotated[str, typer.Option("-k", "--k", metavar="N,N,...", help="Columns to keep at each event.")] = ",".join(
        map(str, DEFAULTS.ks)
    ),
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="What to measure, as in mwtool eval; repeatable, or --tasks a,b.",
            show_default=",".join(DEFAULTS.tasks),
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what each kept part gives back (.png, .svg or .pdf).")
    ] = None,
    bos: options.FirstToken = DEFAULTS.bos,
    batch_size: options.BatchSize = None,
    limit: options.Limit = None,
    window: options.Window = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the random controls.", callback=options.a_seed)
    ] = DEFAULTS.seed,
    revision: options.Revision = None,
    dtype: options.Precision = LOADING.dtype,
    device: options.Device = LOADING.device,
    device_map: options.Spread = None,
    gguf_file: options.GGUFFile = None,
    trust_remote_code: options.Trust = False,
    dry_run: forecasts.DryRun = False,
    json: options.Json = False,
    output: options.Output = None,
    report: options.Page = None,
    table: options.TableFile = None,
    config: options.Config = None,
    debug: options.Debug = False,
) -> None:
    """Measure what quantizing costs, and how much of it a few protected weights give back."""
    ks = numbers(k, "-k")
    if 0 in ks:
        raise options.WrongUsage("-k 0 keeps no column; nothing kept is always measured")
    if dry_run:
        forecasts.refuse_beside(plot=plot, report=report, table=table)
    from mwtool.cli.outputs import Outputs
    from mwtool.cli.terminal import command_line, note_all, run_progress, say_once
    from mwtool.evaluation.evaluate import check
    from mwtool.evaluation.tasks import parse_tasks
    from mwtool.files.document import text_of
    from mwtool.models.load import load
    from mwtool.quantization.check import quantize_check as check_quantized
    from mwtool.quantization.document import quantize_document
    from mwtool.scan.loaded import scan_loaded

    say_once()
    plan = QuantizeConfig(bits=parse_bits(bits), group=parse_group(group), levels=levels, ks=ks, seed=seed)
    tasks = parse_tasks(task or DEFAULTS.tasks)
    check(tasks)
    outputs = Outputs(output, plot, report, table)
    if not dry_run:
        outputs.check()
    loaded = load(
        model,
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        gguf_file=gguf_file,
        trust_remote_code=trust_remote_code,
    )
    scan = scan_loaded(loaded, Settings(k=max(ks), bos=bos))
    note_all((*loaded.notes, *scan.notes))
    measuring = Options(batch_size=batch_size, limit=limit, window=window, bos=bos, seed=seed)
    if dry_run:
        from mwtool.quantization.forecast import forecast_check

        forecasts.show([forecast_check(loaded, scan, tasks, plan, measuring)], json=json)
        return
    with run_progress() as on_run:
        found = check_quantized(loaded, scan, tasks, plan, measuring, on_run=on_run)
    note_all(found.notes)
    text = text_of(quantize_document(loaded, found, command=command_line()))
    outputs.keep(text)
    if json:
        sys.stdout.write(text)
    else:
        _show(found)
    outputs.draw(text)


def _show(found: QuantizeCheck) -> None:
    from mwtool.cli.terminal import report_console
    from mwtool.quantization.report import quantize_report

    report_console().print(quantize_report(found))


app = single()
app.command("quantize-check", cls=Command, epilog=EXAMPLES)(quantize_check)
