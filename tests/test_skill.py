"""What agents read of mwtool, and how the hf CLI finds it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml
from skill import SKILL, skill

ROOT = Path(__file__).parent.parent


def test_the_skill_is_what_the_commands_say() -> None:
    """If this fails: python tests/support/skill.py."""
    assert SKILL.read_text(encoding="utf-8") == skill().rstrip() + "\n"


def test_the_skill_begins_with_its_name_and_when_to_use_it() -> None:
    _, head, _ = SKILL.read_text(encoding="utf-8").split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["name"] == SKILL.parent.name == "mwtool"
    assert 0 < len(found["description"]) <= 1024  # as the format of skills says


def test_the_hf_cli_finds_the_script_it_looks_for_in_a_python_extension() -> None:
    """`hf extensions install OWNER/hf-mwtool` installs the package and runs its script `hf-mwtool`."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts["hf-mwtool"] == scripts["mwtool"]
