"""`mwtool adapters`: list them, check them, start a new one."""

from __future__ import annotations

import json as _json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mwtool import __version__
from mwtool.cli import options, waiting
from mwtool.cli.command import Command, Group
from mwtool.cli.commands import single
from mwtool.errors import BadPlugin

if TYPE_CHECKING:
    from mwtool.testing.kit import Conformance

app = single(cls=Group)
EXAMPLES = """\
mwtool adapters                          # the model types that can be scanned
mwtool adapters check                    # check every installed adapter
mwtool adapters new mymodel ./plugin     # start an adapter for a new type
"""


@app.callback(invoke_without_command=True, epilog=EXAMPLES)
def _list(context: typer.Context, json: options.Json = False, debug: options.Debug = False) -> None:
    """List the supported model types; check an adapter, or start a new one."""
    if context.invoked_subcommand is not None:
        return
    from mwtool.architecture.registry import installed

    plugins = installed()
    if json:
        _print("mwtool.adapters/1", adapters=[asdict(plugin) for plugin in plugins])
        return
    from mwtool.cli.terminal import report_console
    from mwtool.testing.report import adapters_table

    report_console().print(adapters_table(plugins))


@app.command(
    cls=Command,
    epilog="mwtool adapters check llama\nmwtool adapters check mypackage.adapter:ADAPTER\n",
)
def check(
    target: Annotated[
        str | None,
        typer.Argument(metavar="MODEL_TYPE|MODULE:OBJECT", help="What to check; by default every installed adapter."),
    ] = None,
    model_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="With MODULE:OBJECT: the model type to check it on; by default all it lists in `tiny`."
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check on tiny random models that adapters describe their model types correctly."""
    results = _check(target, model_type)
    if json:
        _print("mwtool.adapters.check/1", results=[asdict(result) for result in results])
    else:
        from mwtool.cli.terminal import report_console
        from mwtool.testing.report import conformance_table

        report_console().print(conformance_table(results))
    failed = [result for result in results if result.fault is not None]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise BadPlugin(f"{failed[0].model_type}: {failed[0].fault}{more}")


@app.command(cls=Command, epilog="mwtool adapters new mymodel ./mymodel-adapter\n")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model type it is for, as in config.json.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it; a new or empty folder.")],
    debug: options.Debug = False,
) -> None:
    """Write a Python package with an adapter for a model type, its entry point and a conformance test."""
    from mwtool.architecture.registry import installed
    from mwtool.testing.scaffold import write_package

    waiting.clear()
    for path in write_package(name, folder):
        typer.echo(str(path))
    for plugin in installed():
        if plugin.model_type == name:
            typer.echo(f"note: {plugin} serves {name} too; with both installed neither is used", err=True)


def _check(target: str | None, model_type: str | None) -> list[Conformance]:
    from mwtool.architecture.registry import adapter_for, installed, load_object
    from mwtool.testing.kit import Check, Conformance, check_type

    if target is not None and ":" in target:
        adapter = load_object(target)
        types = [model_type] if model_type else list(adapter.tiny)
        if not types:
            raise options.WrongUsage(f"{target} lists no model types in `tiny`; give one with --model-type")
        return [check_type(name, adapter) for name in types]
    if model_type is not None:
        raise options.WrongUsage("--model-type is used with MODULE:OBJECT only")
    results = []
    for name in [target] if target else sorted({plugin.model_type for plugin in installed()}):
        try:
            results.append(check_type(name, adapter_for(name)))
        except BadPlugin as fault:  # it cannot be loaded: the others are checked all the same
            results.append(Conformance(name, "", (Check("shapes", passed=False, detail=str(fault)),)))
    return results


def _print(schema: str, **content: Any) -> None:
    waiting.clear()
    document = {"schema": schema, "mwtool_version": __version__, **content}
    typer.echo(_json.dumps(document, indent=2))
