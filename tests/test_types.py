"""The annotations of both packages reach whoever installs them: plugins and scripts type-check against them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from command import run

ROOT = Path(__file__).parent.parent
SCRIPT = '''\
"""A training script that uses the public names."""

from typing import assert_type

import mwtool

scan = mwtool.scan_checkpoint("demo")
assert_type(scan, mwtool.Scan)
assert scan.massive is not None
assert_type(scan.massive.indices, tuple[int, ...])
callback = mwtool.MacDropCallback(scan.massive, "step:0.8")
callback.no_such_attribute
"""A docstring is needed nowhere else."""
from mwtool.testing import check_adapter, tiny_config

check_adapter("not an adapter", tiny_config("llama"))
'''


@pytest.mark.parametrize("package", ["mwtool", "mwtool_adapters"])
def test_the_marker_of_typed_packages_is_among_their_files(package: str) -> None:
    assert files(package).joinpath("py.typed").is_file()


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_plugins_and_scripts_check_strictly_and_their_mistakes_are_found(tmp_path: Path) -> None:
    """One run of mypy, since it reads torch's annotations; the next time they are in its cache."""
    assert run("adapters", "new", "my_type", tmp_path / "plugin").code == 0
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    pebble = ROOT / "docs/examples/mwtool-pebble/mwtool_pebble/adapter.py"
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file="]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "strict")]
    checked = ["plugin/mwtool_my_type", "plugin/tests", str(pebble), "script.py"]
    done = subprocess.run([*command, *checked], cwd=tmp_path, capture_output=True, text=True, check=False)
    found = re.findall(r"^(.+?):\d+: error: .*\[(.+)\]$", done.stdout, flags=re.MULTILINE)
    assert found == [("script.py", "attr-defined"), ("script.py", "arg-type")], done.stdout + done.stderr
