"""What the documentation says exists, and what exists is in the documentation."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import run
from packaging.requirements import Requirement
from typer.main import get_command

import mwtool
from mwtool.cli import app
from mwtool.scan.document import scan_document

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def keys(value: Any) -> Iterator[str]:
    """Every key of a document, at every depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_every_key_of_a_scan_document_is_described(model_type: str) -> None:
    model = tiny.model(model_type)
    tiny.plant(model)
    model.config.name_or_path = "Mixtral-8x7B-v0.1"  # of the paper's table, so that `published` is there
    document = scan_document(mwtool.scan_model(model))
    described = set(re.findall(r"`([a-z_0-9]+)`", (ROOT / "docs" / "json.md").read_text(encoding="utf-8")))
    assert document["published"] is not None
    assert set(keys(document)) - described == set()


@pytest.mark.parametrize("command", [["adapters"], ["adapters", "check", "llama"]])
def test_every_key_of_the_adapters_documents_is_described(command: list[str]) -> None:
    document = run(*command, "--json").document
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([a-z_0-9]+)`", page.partition("## `mwtool.adapters/1`")[2]))
    assert set(keys(document)) - described == {"schema", "mwtool_version"}
    assert f"`{document['schema']}`" in page


@pytest.mark.parametrize("file", ["model.py", "adapter.py"])
def test_the_tutorials_code_is_the_examples(file: str) -> None:
    """Whoever copies it from the page has the package that CI installs."""
    tutorial = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    shown = tutorial.partition(f"`mwtool-pebble/mwtool_pebble/{file}`:\n\n```python\n")[2].partition("```\n")[0]
    assert shown == (ROOT / "docs/examples/mwtool-pebble/mwtool_pebble" / file).read_text(encoding="utf-8")


def test_every_folder_has_its_line_in_the_readme() -> None:
    tree = README.partition("## Files")[2].partition("```\n\n")[0]
    listed = set(re.findall(r"^  (\w+/) ", tree, flags=re.MULTILINE))
    folders = {f"{path.parent.name}/" for path in (ROOT / "mwtool").glob("*/__init__.py")}
    assert folders - listed == set()


def test_every_command_is_in_the_readme() -> None:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined] # Typer gives a group
    assert [name for name in commands if f"`mwtool {name}" not in README] == []


def test_the_pinned_versions_satisfy_what_the_project_requires() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in ("test", "dev", "eval") for line in project["optional-dependencies"][extra]]
    required = [Requirement(line) for line in (*project["dependencies"], *extras) if not line.startswith("mwtool")]
    pinned = {one.name: pins[one.name.lower().replace("_", "-")] for one in required}
    assert [str(one) for one in required if not one.specifier.contains(pinned[one.name])] == []
