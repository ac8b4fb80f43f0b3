"""Lookup of adapters: one import, and a message that names the plugin before its fault."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import tiny
from transformers import CONFIG_MAPPING, PretrainedConfig

from mwtool.architecture import registry
from mwtool.architecture.layout import Adapter
from mwtool.architecture.registry import adapter_for, installed, load_object, register
from mwtool.architecture.unsupported import REASONS
from mwtool.errors import BadPlugin, UnsupportedModel


class Here:
    """An adapter of this module; `fails` says what its method raises."""

    tiny: dict[str, dict[str, object]] = {"here": {"hidden_size": 8}}  # noqa: RUF012 - as a plugin would write it

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails = fails

    def layer(self, _config: object, _index: int) -> object:
        if self.fails is not None:
            raise self.fails
        return None


GOOD, FAILING, REFUSING = Here(), Here(ZeroDivisionError("by zero")), Here(UnsupportedModel("two FFNs"))
NEITHER = object()
Announce = Callable[..., None]


class FromNowhere:
    """A distribution's metadata, as far as the registry reads it."""

    def __init__(self, name: str) -> None:
        self.name, self.version = name, "1.2"


@pytest.fixture
def announce(monkeypatch: pytest.MonkeyPatch) -> Announce:
    """Put entry points in the place of the installed ones: model_type=value, of one distribution."""
    entries: list[EntryPoint] = []

    def entry_points(**wanted: str) -> EntryPoints:
        return EntryPoints(entries).select(**wanted)

    def add(distribution: str = "some-plugin", **values: str) -> None:
        for name, value in values.items():
            entry = EntryPoint(name, value, registry.GROUP)
            entry.__dict__["dist"] = FromNowhere(distribution)
            entries.append(entry)

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return add


def test_the_adapter_is_found_with_the_distribution_it_came_from(announce: Announce) -> None:
    announce(here="test_registry:GOOD", there="nosuch.module:X")
    found = adapter_for("here")
    assert found.adapter is GOOD
    assert isinstance(found, Adapter)
    assert (found.plugin.distribution, found.plugin.version) == ("some-plugin", "1.2")
    assert found.tiny == Here.tiny
    assert [plugin.model_type for plugin in installed()] == ["here", "there"]


def test_an_unknown_type_says_where_those_installed_are_listed_and_how_to_add_one(announce: Announce) -> None:
    announce(beta="x:Y", alpha="x:Y")
    with pytest.raises(UnsupportedModel, match=r"'gamma'; .* the 2 installed ones; `mwtool adapters new gamma DIR`"):
        adapter_for("gamma")


def test_with_nothing_installed_that_is_said(announce: Announce) -> None:
    announce()
    with pytest.raises(UnsupportedModel, match="lists the 0 installed ones"):
        adapter_for("llama")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("nosuch_module:X", "ModuleNotFoundError: No module named 'nosuch_module'"),
        ("test_registry:NOSUCH", "AttributeError: .*NOSUCH"),
        ("test_registry:NEITHER", "expected an object with a method layer"),
        ("test_registry:Here", "expected an object with a method layer"),
        ("no value at all", "some-plugin 1.2"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named_before_its_fault(announce: Announce, value: str, fault: str) -> None:
    announce(broken=value, good="test_registry:GOOD")
    with pytest.raises(BadPlugin, match=rf"^adapter '{value}' \(some-plugin 1\.2\).*") as refused:
        adapter_for("broken")
    assert refused.match(fault)
    assert adapter_for("good").adapter is GOOD


def test_an_adapter_that_fails_is_named_with_the_layer(announce: Announce) -> None:
    announce(broken="test_registry:FAILING", picky="test_registry:REFUSING")
    with pytest.raises(BadPlugin, match=r"some-plugin 1\.2\) failed for layer 3: ZeroDivisionError: by zero"):
        adapter_for("broken").layer(PretrainedConfig(), 3)
    with pytest.raises(UnsupportedModel, match=r"^two FFNs$"):  # what it means to say passes
        adapter_for("picky").layer(PretrainedConfig(), 3)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (property(lambda _: 1 / 0), "reading its `tiny` failed: ZeroDivisionError"),
        (["here"], r"`tiny` is \['here'\]; expected a mapping from model type to options"),
        ({"here": 3}, r"`tiny` is \{'here': 3\}; expected a mapping from model type to options"),
    ],
)
def test_tiny_configurations_that_are_none_are_told_of(
    announce: Announce, monkeypatch: pytest.MonkeyPatch, given: object, fault: str
) -> None:
    announce(here="test_registry:GOOD")
    monkeypatch.setattr(Here, "tiny", given)
    with pytest.raises(BadPlugin, match=rf"some-plugin 1\.2\): {fault}"):
        _ = adapter_for("here").tiny


def test_two_claimants_are_both_named(announce: Announce) -> None:
    announce("plugin-b", here="b:B")
    announce("plugin-a", here="a:A", there="test_registry:GOOD")
    with pytest.raises(BadPlugin, match=r"'here' is claimed by plugin-a \(a:A\) and plugin-b \(b:B\); uninstall"):
        adapter_for("here")
    assert adapter_for("there").adapter is GOOD


def test_a_distribution_found_twice_on_the_path_is_one(announce: Announce) -> None:
    announce(here="test_registry:GOOD")
    announce(here="test_registry:GOOD")
    assert adapter_for("here").adapter is GOOD
    assert len(installed()) == 1


def test_looking_up_one_adapter_imports_no_other_and_listing_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("mwtool_adapters")]:
        monkeypatch.delitem(sys.modules, name)
    assert len(installed()) > 10
    assert not [name for name in sys.modules if name.startswith("mwtool_adapters")]
    adapter_for("phi")
    assert [name for name in sys.modules if name.startswith("mwtool_adapters.")] == ["mwtool_adapters.phi"]


def test_an_object_not_installed_is_loaded_and_a_class_called() -> None:
    assert load_object("test_registry:GOOD").adapter is GOOD
    assert isinstance(load_object("test_registry:Here").adapter, Here)
    with pytest.raises(BadPlugin, match=r"'test_registry:NEITHER' \(not installed\)"):
        load_object("test_registry:NEITHER")


def test_a_type_unknown_to_transformers_needs_an_adapter_or_code_of_its_own(announce: Announce) -> None:
    announce(here="test_registry:FAILING", broken="nosuch_module:X")
    register("here")
    register("llama")  # known: no adapter is looked up yet
    register("nosuch", own_code=True)
    with pytest.raises(UnsupportedModel, match="'nosuch'"):
        register("nosuch")
    with pytest.raises(BadPlugin, match="nosuch_module"):
        register("broken", own_code=True)


def test_what_no_adapter_can_describe_is_refused_with_the_reason_unless_a_plugin_does(announce: Announce) -> None:
    announce()
    with pytest.raises(UnsupportedModel, match="'bitnet' cannot be described by an adapter: it normalizes the interm"):
        adapter_for("bitnet")
    announce(bitnet="test_registry:GOOD")
    assert adapter_for("bitnet").adapter is GOOD


def test_what_is_refused_exists_and_is_not_built_in() -> None:
    assert [name for name in REASONS if name not in CONFIG_MAPPING or name in tiny.ALL_TYPES] == []


def test_every_built_in_name_is_a_type_transformers_knows() -> None:
    assert [name for name in tiny.ALL_TYPES if name not in CONFIG_MAPPING] == []


def test_a_type_that_is_almost_a_known_one_is_answered_with_that() -> None:
    with pytest.raises(UnsupportedModel, match=r"no adapter for model type 'lama'; did you mean llama\? `mwtool"):
        adapter_for("lama")
