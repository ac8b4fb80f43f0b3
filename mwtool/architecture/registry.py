"""Architecture adapters by model type, found through entry points; only the requested one is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from mwtool.architecture.layout import FFN, Adapter, DecoderLayer
from mwtool.architecture.unsupported import REASONS
from mwtool.errors import BadPlugin, MwtoolError, UnsupportedModel, nearest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

GROUP = "mwtool.adapters"


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point: a model type, the adapter object for it, and the distribution that provides it."""

    model_type: str
    value: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"adapter {self.value!r} ({f'{self.distribution} {self.version}'.strip()})"


@dataclass(frozen=True, slots=True)
class Installed:
    """An adapter and the plugin that provides it, which is named in every error the adapter raises."""

    adapter: Adapter
    plugin: Plugin

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        """The adapter's description of a layer. Raises BadPlugin, which names the plugin, if the adapter fails."""
        with _as_bad_plugin(f"{self.plugin} failed for layer {index}"):
            layer = self.adapter.layer(config, index)
            if not isinstance(layer, DecoderLayer):
                return layer  # reported by `decoder_layers`
            return replace(layer, ffns=tuple(self._with_named_errors(ffn) for ffn in layer.ffns))

    def _with_named_errors(self, ffn: FFN) -> FFN:
        if not isinstance(ffn, FFN) or ffn.combine is None:
            return ffn
        return replace(ffn, combine=Combine(ffn.combine, f"{self.plugin}: combine of {ffn.module}"))

    @property
    def tiny(self) -> Mapping[str, Mapping[str, Any]]:
        """Options of tiny configurations, by model type; empty if the adapter has none. Raises BadPlugin."""
        with _as_bad_plugin(f"{self.plugin}: reading its `tiny` failed"):
            given = getattr(self.adapter, "tiny", {})
        if not isinstance(given, Mapping) or not all(isinstance(one, Mapping) for one in given.values()):
            raise BadPlugin(f"{self.plugin}: `tiny` is {given!r}; expected a mapping from model type to options")
        return given

    def __str__(self) -> str:
        return str(self.plugin)


@dataclass(frozen=True, slots=True)
class Combine:
    """An adapter's `combine` function; its errors name the plugin whenever it runs.

    label: what it is called in messages.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    label: str

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """The intermediate state, (..., I), from gate and up, (..., I) each.

        Raises BadPlugin if the function fails, or returns a tensor of another shape or dtype.
        """
        with _as_bad_plugin(f"{self.label} failed"):
            state = self.function(gate, up)
            found, expected = (f"{one.dtype} of shape {tuple(one.shape)}" for one in (state, up))
        if found != expected:
            raise BadPlugin(f"{self.label} returned {found}; expected {expected}, as its inputs")
        return state


def installed() -> list[Plugin]:
    """All installed adapter entry points, sorted by model type. Imports none of the plugins."""
    found = {_plugin(entry) for entry in entry_points(group=GROUP)}  # a distribution may be on the path twice
    return sorted(found, key=lambda p: (p.model_type, p.distribution, p.value))


def adapter_for(model_type: str) -> Installed:
    """The adapter registered under this ``config.model_type``.

    Raises UnsupportedModel if there is none, BadPlugin if it cannot be imported or several plugins claim the type.
    """
    entries = entry_points(group=GROUP, name=model_type)
    claims = {(entry.value, _plugin(entry).distribution): entry for entry in entries}
    if not claims and model_type in REASONS:
        raise UnsupportedModel(f"model type {model_type!r} cannot be described by an adapter: {REASONS[model_type]}")
    if not claims:
        known = [plugin.model_type for plugin in installed()]
        advice = nearest(model_type, known, f"`mwtool adapters` lists the {len(known)} installed ones;", cutoff=0.7)
        raise UnsupportedModel(
            f"no adapter for model type {model_type!r}; {advice} `mwtool adapters new {model_type} DIR` creates a "
            f"package to write one in"
        )
    if len(claims) > 1:
        named = " and ".join(f"{distribution} ({value})" for value, distribution in sorted(claims, key=lambda c: c[1]))
        raise BadPlugin(f"model type {model_type!r} is claimed by {named}; uninstall all but one")
    return _load(next(iter(claims.values())))


def register(model_type: str, *, own_code: bool = False) -> None:
    """Import the adapter of a type that transformers does not know, so that its module can register the type there.

    own_code: the checkpoint comes with modeling code for the type, so an adapter is not required.
    Raises as `adapter_for` does.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING and not (own_code and not entry_points(group=GROUP, name=model_type)):
        adapter_for(model_type)


def load_object(value: str) -> Installed:
    """Import an adapter that is not installed, given as ``MODULE:OBJECT``; a class is instantiated.

    Raises BadPlugin if it cannot be imported or is not an adapter.
    """
    entry = EntryPoint(name=value, value=value, group=GROUP)
    with _as_bad_plugin(f"adapter {value!r} cannot be imported"):
        adapter = entry.load()
        adapter = adapter() if isinstance(adapter, type) else adapter
        return _checked(adapter, Plugin("", value, "not installed", ""))


def _load(entry: EntryPoint) -> Installed:
    plugin = _plugin(entry)
    with _as_bad_plugin(f"{plugin} cannot be imported"):
        return _checked(entry.load(), plugin)


def _checked(adapter: object, plugin: Plugin) -> Installed:
    if isinstance(adapter, type) or not isinstance(adapter, Adapter):
        raise BadPlugin(f"{plugin} is {adapter!r}; expected an object with a method layer(config, index)")
    return Installed(adapter, plugin)


@contextmanager
def _as_bad_plugin(named: str) -> Iterator[None]:
    """Turn any exception of a plugin into BadPlugin, except mwtool's own, such as UnsupportedModel."""
    try:
        yield
    except MwtoolError:
        raise
    except Exception as fault:  # a plugin may raise anything, and the message must name the plugin
        raise BadPlugin(f"{named}: {type(fault).__name__}: {fault}") from fault


def _plugin(entry: EntryPoint) -> Plugin:
    dist = entry.dist
    return Plugin(entry.name, entry.value, dist.name if dist else "unknown", dist.version if dist else "?")
