"""How the house is built: which file may import which, and what its public names are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mwtool

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mwtool"
ADAPTERS = sorted((ROOT / "adapters" / "mwtool_adapters").glob("*.py"))
TREE = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Files")[2].partition("```\n\n")[0]
ORDER = [name.rstrip("/").removesuffix(".py") for name in re.findall(r"^  (\w+\.py|\w+/) ", TREE, flags=re.MULTILINE)]
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module named in an import statement, those for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(str(node.module))
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The files and folders of the package that a file imports from."""
    parts = [name.split(".") for name in imported(path) if name.startswith("mwtool.")]
    return {part[1] for part in parts if (PACKAGE / f"{part[1]}.py").exists() or (PACKAGE / part[1]).is_dir()}


def libraries(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("name", [name for name in ORDER if (PACKAGE / f"{name}.py").exists()])
def test_a_file_imports_only_from_files_above_it_in_the_readme(name: str) -> None:
    above = ORDER[: ORDER.index(name)]
    below = {one for one in ours(PACKAGE / f"{name}.py") if one in ORDER} - {*above, name}
    assert below == set()


def test_only_the_command_line_knows_all_others() -> None:
    """And only reports, plots and the command line draw on a terminal or a canvas."""
    outside = [path for path in SOURCES if path.parent.name != "cli" and path.name != "__main__.py"]
    assert [path.name for path in outside if "cli" in ours(path)] == []
    drawing = [path.name for path in outside if libraries(path) & {"rich", "typer", "matplotlib"}]
    assert [name for name in drawing if not re.fullmatch(r"(.*_)?(report|plots)\.py", name)] == []


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_adapters_import_the_layout_and_no_library_that_is_heavy(path: Path) -> None:
    assert ours(path) <= {"layout"}
    at_import = {
        name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([str(node.module)] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])
    }
    assert {name.partition(".")[0] for name in at_import} & {"torch", "transformers", "numpy"} == set()


def test_there_is_no_top_level_package_called_adapters() -> None:
    """It would share its name with a distribution on PyPI; installing both would mix their files."""
    assert not (ROOT / "adapters" / "__init__.py").exists()


def test_one_handler_catches_everything_and_it_is_around_plugins() -> None:
    broad = []
    for path in [*SOURCES, *ADAPTERS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            caught = ast.unparse(node.type) if isinstance(node, ast.ExceptHandler) and node.type else ""
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            if bare or re.search(r"\b(Base)?Exception\b", caught):
                broad.append(path.name)
    assert broad == ["registry.py"]


def test_every_public_name_exists_and_has_words_to_it() -> None:
    for name in mwtool.__all__:
        assert name in dir(mwtool)
        assert name == "__version__" or getattr(mwtool, name).__doc__
    assert sorted(mwtool.__all__) == sorted([*mwtool._HOMES, "__version__"])
    with pytest.raises(AttributeError, match="has no attribute 'scan_everything'"):
        _ = mwtool.scan_everything


def test_no_public_function_is_named_after_a_module() -> None:
    """`mwtool.scan` is the module, whether or not it was imported before."""
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules & set(mwtool.__all__) == set()
