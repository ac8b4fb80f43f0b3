"""Model type -> adapter, through entry points, importing only the one that is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from mwtool.errors import BadPlugin, UnsupportedModel
from mwtool.layout import Adapter

GROUP = "mwtool.adapters"


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point: a model type, the object that serves it, and the distribution it came with."""

    model_type: str
    value: str
    distribution: str
    version: str


def installed() -> list[Plugin]:
    """Every adapter entry point there is, by model type; imports none of them."""
    return sorted((_plugin(entry) for entry in entry_points(group=GROUP)), key=lambda p: (p.model_type, p.distribution))


def adapter_for(model_type: str) -> Adapter:
    """The adapter registered under this ``config.model_type``.

    Raises UnsupportedModel if there is none, BadPlugin if it cannot be loaded or two lay claim to the type.
    """
    entries = entry_points(group=GROUP, name=model_type)
    claims = {(entry.value, _plugin(entry).distribution): entry for entry in entries}
    if not claims:
        raise UnsupportedModel(
            f"no adapter for model type {model_type!r}; installed are {_names(p.model_type for p in installed())}. "
            f"An adapter is a few lines in a package of its own: see docs/adapters.md"
        )
    if len(claims) > 1:
        named = " and ".join(f"{distribution} ({value})" for value, distribution in sorted(claims, key=lambda c: c[1]))
        raise BadPlugin(f"model type {model_type!r} is claimed by {named}; uninstall all but one")
    return _load(next(iter(claims.values())))


def _load(entry: EntryPoint) -> Adapter:
    plugin = _plugin(entry)
    named = f"adapter {plugin.value!r} of {plugin.distribution} {plugin.version}"
    try:
        adapter = entry.load()
    except Exception as fault:  # a plugin may raise anything at all; it must not pass for a fault of ours
        raise BadPlugin(f"{named} cannot be imported: {type(fault).__name__}: {fault}") from fault
    if isinstance(adapter, type) or not isinstance(adapter, Adapter):
        raise BadPlugin(f"{named} is {adapter!r}; expected an object with a method layer(config, index)")
    return adapter


def _plugin(entry: EntryPoint) -> Plugin:
    dist = entry.dist
    return Plugin(entry.name, entry.value, dist.name if dist else "unknown", dist.version if dist else "?")


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names))) or "none"
