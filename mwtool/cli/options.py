"""Options that several commands share, under the names the ecosystem uses."""

from __future__ import annotations

import difflib
import math
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mwtool.errors import BadValue

if TYPE_CHECKING:
    from mwtool.scan.targets import Choice


class DType(StrEnum):
    """Precisions a model can be computed in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class On(StrEnum):
    """Where rows are taken out of a PEFT adapter folder's model."""

    base = "base"
    merged = "merged"


class DeviceMap(StrEnum):
    """How accelerate spreads a model over devices."""

    auto = "auto"
    balanced = "balanced"
    balanced_low_0 = "balanced_low_0"
    sequential = "sequential"


def opening(
    *,
    on: On,
    revision: str | None,
    dtype: DType,
    device: str,
    device_map: DeviceMap | None,
    trust_remote_code: bool,
    gguf_file: str | None,
) -> dict[str, Any]:
    """What `mwtool.load.load` is told of the options with which a whole model is opened."""
    return {
        "on": on.value,
        "revision": revision,
        "dtype": dtype.value,
        "device": device,
        "device_map": None if device_map is None else device_map.value,
        "trust_remote_code": trust_remote_code,
        "gguf_file": gguf_file,
    }


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
            line = str(fault).partition("\n")[0]
            raise BadValue(f"--device {device!r} cannot be used here ({line}); cpu always can") from fault
    return device


def finite(value: float) -> float:
    """A threshold that can be written down in JSON."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a YAML file's entries the defaults of this command; flags still win."""
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except RecursionError as fault:
        raise typer.BadParameter(f"{path} is nested too deeply; expected option names and values") from fault
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as fault:  # tags: `!!int x`, `2026-99-99`
        raise typer.BadParameter(f"{path} cannot be read: {' '.join(str(fault).split())}") from fault
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} holds a {type(values).__name__}; expected option names and values")
    taken = {str(p.name): p for p in context.command.params if p.name not in ("config", "help")}
    known = _known(path, values, list(taken))
    for name, value in known.items():  # one value of an option that may be repeated
        if (getattr(taken[name], "multiple", False) or taken[name].nargs == -1) and not isinstance(value, list):
            known[name] = [value]
    context.default_map = {**(context.default_map or {}), **known}
    return path


def _known(path: Path, values: dict[Any, Any], names: list[str]) -> dict[str, Any]:
    known = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean {near[0].replace('_', '-')}?" if near else f"known are {', '.join(sorted(names))}"
            raise typer.BadParameter(f"{path} has an unknown key {key!r}; {advice}")
        known[name] = value
    return known


def numbers(text: str, name: str) -> tuple[int, ...]:
    """A list like 0,1,3: no duplicates, none negative. Raises BadParameter, which is wrong usage."""
    parts = [part.strip() for part in text.split(",")]
    bad = next((part for part in parts if not (part.isascii() and part.isdigit())), None)
    if bad is not None:
        raise typer.BadParameter(f"{name} {text!r}: {bad!r} is no number from 0 on; expected a list such as 0,1,3")
    values = [int(part) for part in parts]
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise typer.BadParameter(f"{name} {text!r} names {twice} twice")
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
    """Which rows the user chose. Raises BadParameter, which is wrong usage."""
    from mwtool.scan.targets import Choice

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
        raise typer.BadParameter(str(fault)) from fault


MODEL, OUTPUT = "Opening the model", "Configuration and output"
"""Panels of `--help`, behind what is the command's own."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, local folder, PEFT adapter folder, GGUF file, or demo, the bundled model.",
    ),
]
BaseModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, local folder, GGUF file, or demo, the bundled model.")
]
GGUFFile = Annotated[
    str | None,
    typer.Option(
        "--gguf-file", metavar="NAME", help="Which GGUF file of a folder or repository.", rich_help_panel=MODEL
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel=MODEL)]
Precision = Annotated[
    DType,
    typer.Option("--dtype", help="Precision to compute in; auto is what the checkpoint says.", rich_help_panel=MODEL),
]
Device = Annotated[
    str, typer.Option(callback=usable, help="Where to compute: cpu, cuda, cuda:1, mps.", rich_help_panel=MODEL)
]
Spread = Annotated[
    DeviceMap | None,
    typer.Option(
        "--device-map",
        help="Spread over all devices, as accelerate does.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Massive = Annotated[Path | None, typer.Option(help="A saved scan; without it the model is scanned first.")]
Event = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N...]|all|up|down", help="Rows of these events of the scan, together.", show_default=False
    ),
]
Layers = Annotated[
    str | None, typer.Option(metavar="N[,N...]", help="Top rows of these layers, together.", show_default=False)
]
Expert = Annotated[int | None, typer.Option(min=0, help="With one layer or event: the routed expert.")]
Indices = Annotated[
    str | None,
    typer.Option(metavar="I[,J...]", help="With one layer or event: these rows, in this order.", show_default=False),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.", rich_help_panel=MODEL)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document to stdout and nothing else.", rich_help_panel=OUTPUT)
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Also write the JSON document to this file.", rich_help_panel=OUTPUT),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_config,
        help="YAML file of option values; flags win.",
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
