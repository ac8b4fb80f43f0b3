"""The template of a package with an adapter, which `mwtool adapters new` writes."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from mwtool.errors import BadValue, OutputError

PYPROJECT = Template("""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "mwtool-$dashed"
version = "0.1.0"
description = "mwtool adapter for $name models"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["mwtool"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points."mwtool.adapters"]
"$name" = "mwtool_$module.adapter:ADAPTER"

[tool.hatch.build.targets.wheel]
packages = ["mwtool_$module"]
""")

INIT = Template('''\
"""mwtool adapter for $name models."""
''')

ADAPTER = Template('''\
"""Where $name models keep their feed-forward networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from mwtool.architecture.layout import DecoderLayer, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class $class_:
    tiny: ClassVar[dict[str, dict[str, Any]]] = {"$name": {}}
    """Options that a tiny configuration needs besides the common ones, for the checks."""

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        """The layout of Llama: change the names to those in `model.named_parameters()`."""
        path = f"model.layers.{index}"
        ffn = gated_mlp(f"{path}.mlp", config.hidden_act)
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp")


ADAPTER = $class_()
''')

TEST = Template("""\
from mwtool.testing import check_adapter, tiny_config

from mwtool_$module.adapter import ADAPTER


def test_the_adapter_describes_the_model() -> None:
    check_adapter(ADAPTER, tiny_config("$name", ADAPTER))
""")

README = Template("""\
# mwtool-$dashed

Lets [mwtool](https://pypi.org/project/mwtool/) read `$name` models.

    pip install -e '.[test]'
    mwtool adapters check $name    # runs every check and reports what is wrong
    pytest

`mwtool_$module/adapter.py` starts with Llama's layout. Change it until the checks pass; then
`mwtool scan MODEL` works on any `$name` checkpoint. If transformers does not know the type, import
the module that registers it there (`AutoConfig.register`, `AutoModelForCausalLM.register`) in
`adapter.py`. mwtool's docs/adapters.md walks through a whole example.
""")


def write_package(name: str, folder: Path) -> list[Path]:
    """Write a package with an adapter for model type `name` to `folder`, and return its files.

    Raises BadValue if the name cannot be a model type, OutputError if the folder is not empty or cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?", name):
        raise BadValue(
            f"{name!r} cannot be a model type; expected letters and digits, with '_', '-' or '.' between them"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not an empty folder; choose another")
    module = re.sub(r"[.-]", "_", name).lower()
    words = {
        "name": name,
        "module": module,
        "dashed": module.replace("_", "-"),
        "class_": "".join(word.capitalize() for word in module.split("_")),
    }
    files = {
        "pyproject.toml": PYPROJECT,
        "README.md": README,
        f"mwtool_{module}/__init__.py": INIT,
        f"mwtool_{module}/adapter.py": ADAPTER,
        "tests/test_adapter.py": TEST,
    }
    return [_write(folder / path, template.substitute(words)) for path, template in files.items()]


def _write(path: Path, text: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as fault:
        raise OutputError(f"{path} could not be written: {fault.strerror or fault}; choose another folder") from fault
    return path
