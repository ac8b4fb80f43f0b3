"""Options that several commands share, under the names that transformers, PEFT, TRL and lm-eval use."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mwtool.cli.command import MODEL, OUTPUT
from mwtool.cli.spelling import named_in_file
from mwtool.errors import BadValue, line_of, nearest
from mwtool.files.text import shown
from mwtool.models.load_options import DeviceMap, DType
from mwtool.scan.settings import Choice

if TYPE_CHECKING:
    from mwtool.models.hub_upload import Destination, Kind

MAX_SEED = 2**32 - 1
"""The largest seed that every library takes."""


class WrongUsage(typer.BadParameter):
    """Options that contradict each other, or one that is missing: exit status 2."""

    def format_message(self) -> str:
        """The message alone: no single option is to blame."""
        return self.message


def _debug(on: bool) -> None:
    if on:
        os.environ["MWTOOL_DEBUG"] = "1"


def usable(device: str) -> str:
    """Refuse a device that is not there before a model is opened."""
    if device != "cpu":
        import torch

        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as fault:
            raise BadValue(
                f"--device {device!r} is not available here ({line_of(fault)}); expected cpu, or a device torch sees"
            ) from fault
    return device


def resumable(output: Path | None, *, resume: bool) -> None:
    """Raise WrongUsage where there is no file to go on from."""
    if resume and output is None:
        raise WrongUsage("--resume continues the file given with -o; add -o FILE")


def finite(value: float) -> float:
    """A threshold that can be written down in JSON."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def a_seed(value: int) -> int:
    """A seed that every library takes."""
    if value > MAX_SEED:
        raise typer.BadParameter(f"{value} is too large; expected at most {MAX_SEED}")
    return value


def _config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a YAML file's entries the defaults of this command; options on the command line override them."""
    if path is None:
        return None
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if (digits := max(map(len, re.findall(r"[0-9]{1000,}", text)), default=0)) > 0:
            raise typer.BadParameter(
                f"{path} cannot be read: it has a number of {digits:,} digits; expected option names and values"
            )
        values = yaml.safe_load(text) or {}
    except RecursionError as fault:
        raise typer.BadParameter(f"{path} is nested too deeply; expected option names and values") from fault
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as fault:  # tags: `!!int x`, `2026-99-99`
        raise typer.BadParameter(f"{path} cannot be read: {line_of(fault, whole=True)}") from fault
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} holds a {type(values).__name__}; expected option names and values")
    known = dict(_default(path, str(key), value, context.command.params) for key, value in values.items())
    context.default_map = {**(context.default_map or {}), **known}
    return path


def _default(path: Path, key: str, value: Any, params: Sequence[Any]) -> tuple[str, Any]:
    """The name Typer knows an option by, and its value: a list where it may be repeated."""
    takes = [one for one in params if one.name not in ("config", "help")]
    param = named_in_file(key, takes)
    if param is None:
        names = [name.removeprefix("--") for one in takes for name in getattr(one, "opts", ()) if len(name) > 2]  # noqa: PLR2004 # not -k
        raise typer.BadParameter(f"{path} has an unknown key {key!r}; {nearest(key.replace('_', '-'), names)}")
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, int) and one.bit_length() > 64:  # noqa: PLR2004 # Python may refuse to write more as text
            raise typer.BadParameter(f"{path}: {key} is an integer of {one.bit_length():,} bits; expected at most 64")
    if getattr(param, "multiple", False) or param.nargs == -1:
        value = [one.strip() for one in value.split(",")] if isinstance(value, str) and key.endswith("s") else value
        value = value if isinstance(value, list) else [value]
    return str(param.name), value


def numbers(text: str, name: str) -> tuple[int, ...]:
    """A list like 0,1,3: no duplicates, none negative, of at most nine digits each. Raises WrongUsage."""
    parts = [part.strip() for part in text.split(",")]
    bad = next((part for part in parts if not (part.isascii() and part.isdigit())), None)
    if bad is not None:
        raise WrongUsage(f"{name} {shown(text)}: {shown(bad)} is not a whole number; expected a list such as 0,1,3")
    long = next((part for part in parts if len(part) > 9), None)  # noqa: PLR2004 # beyond any row, layer or event
    if long is not None:
        raise WrongUsage(f"{name} {shown(text)}: a number has {len(long):,} digits; expected at most 9")
    values = [int(part) for part in parts]
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise WrongUsage(f"{name} {shown(text)} names {twice} twice")
    return tuple(values)


def chosen(
    *,
    massive: Path | None,
    event: str | None,
    layer: str | None,
    expert: int | None,
    indices: str | None,
    each_layer: bool = False,
) -> Choice:
    """Which rows the user chose. Raises WrongUsage."""
    events: Any = () if event is None else event if event in ("all", "up", "down") else numbers(event, "--event")
    try:
        return Choice(
            file=massive,
            events=events,
            layers=() if layer is None else numbers(layer, "--layer"),
            expert=expert,
            indices=() if indices is None else numbers(indices, "--indices"),
            each_layer=each_layer,
        )
    except BadValue as fault:
        raise WrongUsage(str(fault)) from fault


def hub_destination(repo: str | None, kind: Kind, *, private: bool) -> Destination | None:
    """The repository of --push-to-hub, made before the work begins; None without the option. Raises WrongUsage."""
    if repo is None:
        if private:
            raise WrongUsage("--hub-private-repo makes the repository of --push-to-hub private; add --push-to-hub REPO")
        return None
    from mwtool.models.hub_upload import open_destination

    return open_destination(repo, kind, private=private)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hugging Face Hub id, local folder, PEFT adapter folder, GGUF file, or demo for the bundled model.",
    ),
]
BaseModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Hugging Face Hub id, local folder, GGUF file, or demo for the bundled model."
    ),
]
GGUFFile = Annotated[
    str | None,
    typer.Option(
        "--gguf-file", metavar="NAME", help="Which GGUF file of a folder or repository.", rich_help_panel=MODEL
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.", rich_help_panel=MODEL)
]
Precision = Annotated[
    DType,
    typer.Option(
        "--dtype",
        help="Precision to compute in; auto is the one the checkpoint is stored in.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        callback=usable, metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:1, mps.", rich_help_panel=MODEL
    ),
]
Spread = Annotated[
    DeviceMap | None,
    typer.Option(
        "--device-map",
        help="Distribute the model over all devices, as accelerate does.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
FirstToken = Annotated[str, typer.Option(metavar="TOKEN", help="First token: auto, always, or a token or its id.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Windows or questions per batch.", show_default="by memory")
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the layers (torch.compile) for perplexities; it says after how many windows that pays.",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only the first N windows or questions.")]
Window = Annotated[
    int | None, typer.Option(min=2, metavar="N", help="Tokens in a window.", show_default="4096, or the model's limit")
]
Massive = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Take the rows from a saved scan (mwtool scan -o FILE) instead of scanning the model."
    ),
]
Event = Annotated[
    str | None,
    typer.Option(
        metavar="N,...|all|up|down", help="Attack the rows of these events of the scan, together.", show_default=False
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(metavar="N,...", help="Attack the top rows of these layers, together (from 0).", show_default=False),
]
Expert = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="With one layer or event: rows of this routed expert.")
]
Indices = Annotated[
    str | None,
    typer.Option(metavar="I,J,...", help="With one layer or event: these rows, in this order.", show_default=False),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.", rich_help_panel=MODEL),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document to stdout and nothing else.", rich_help_panel=OUTPUT),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the JSON document to FILE.", rich_help_panel=OUTPUT),
]
TableFile = Annotated[
    Path | None,
    typer.Option(
        "--table",
        metavar="FILE",
        help="Write the table as LaTeX (.tex, booktabs), CSV (.csv) or Markdown (.md).",
        rich_help_panel=OUTPUT,
    ),
]
Page = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        help="Write an HTML page with figures, tables, verdicts and settings.",
        rich_help_panel=OUTPUT,
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="REPO",
        help="Upload the result with a card to this repository of the Hub, which is made if need be.",
        rich_help_panel=OUTPUT,
    ),
]
HubPrivate = Annotated[
    bool,
    typer.Option("--hub-private-repo", help="Make that repository private.", rich_help_panel=OUTPUT),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_config,
        metavar="FILE",
        help="Read option values from a YAML file; options on the command line override them.",
        rich_help_panel=OUTPUT,
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        is_eager=True,
        expose_value=True,
        callback=_debug,
        help="Show the traceback of an error.",
        rich_help_panel=OUTPUT,
    ),
]
