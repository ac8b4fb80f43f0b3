"""How the house is built: which file may import which, and what its public names are."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mwtool

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mwtool"
ADAPTERS = sorted((ROOT / "adapters" / "mwtool_adapters").glob("*.py"))
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = {"errors", "interrupts", "_version", "layout", "massive"}
"""Modules beside the folders; `layout` is what plugins import, a re-export."""
MAY_IMPORT = {
    "files": {"errors", "interrupts", "_version"},
    "massive": {"files"},
    "architecture": {"massive"},
    "models": {"architecture"},
    "scan": {"models"},
    "surgery": {"models"},
    "macdrop": {"architecture"},
    "evaluation": {"scan", "surgery"},
    "ablation": {"evaluation"},
    "quantization": {"evaluation"},
    "finetune": {"macdrop", "scan"},
    "report": {"ablation", "quantization", "finetune"},
    "reproduction": {"ablation", "finetune"},
    "testing": {"scan", "surgery"},
    "cli": {"report", "reproduction", "testing"},
}
"""What a folder may import, beside what that may import: one way, no circles."""


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


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def allowed(place: str) -> set[str]:
    """Everything that modules of a folder may import, the folder itself included."""
    return {place, *(one for direct in MAY_IMPORT.get(place, set()) for one in allowed(direct))}


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_folders_import_one_way(place: str) -> None:
    files = sorted((PACKAGE / place).rglob("*.py")) or [PACKAGE / f"{place}.py"]
    assert {one for path in files for one in ours(path)} - allowed(place) == set()


def test_every_folder_has_its_line_in_the_list_and_its_reason_in_a_docstring() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders - {"demo"} == {place for place in MAY_IMPORT if place != "massive"}
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == MODULES
    assert len(folders) + len(list(PACKAGE.glob("*.*"))) <= 23
    for folder in folders - {"cli", "testing"}:
        (docstring,) = ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr), f"{folder} does more than say what it is"


def test_modules_of_a_folder_import_each_other_without_circles() -> None:
    """At import time: what is imported inside a function or for type checkers alone may point back."""
    modules = {one for one in map(module_of, SOURCES) if one.count(".") > 1 or one.split(".")[-1] in MODULES}
    graph = {}
    for path in SOURCES:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        named = [node for node in body if isinstance(node, ast.ImportFrom)]
        found = {f"{node.module}.{one.name}" for node in named for one in node.names} & modules
        graph[module_of(path)] = found | {str(node.module) for node in named if node.module in modules}
    assert tuple(TopologicalSorter(graph).static_order())


def test_only_the_command_line_knows_all_others() -> None:
    """And only reports, plots and the command line draw on a terminal or a canvas."""
    outside = [path for path in SOURCES if path.parent.name != "cli" and path.name != "__main__.py"]
    assert [path.name for path in outside if "cli" in ours(path)] == []
    drawing = {path.name for path in outside if libraries(path) & {"rich", "typer", "matplotlib"}}
    assert drawing <= {
        "report.py",
        "comparison_report.py",
        "comparison_plot.py",
        "tables.py",
        "plot.py",
        "figure.py",
        "svg.py",
        "section.py",
        "bars.py",
        "sections.py",
        "states_plot.py",
        "states_tables.py",
        "track_plot.py",
    }


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


def test_what_catches_everything_is_around_plugins_and_around_tokenizers_which_raise_nothing_more_specific() -> None:
    broad = []
    for path in [*SOURCES, *ADAPTERS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            caught = ast.unparse(node.type) if isinstance(node, ast.ExceptHandler) and node.type else ""
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            if bare or re.search(r"\b(Base)?Exception\b", caught):
                broad.append(path.name)
    assert broad == ["registry.py", "source.py"]


def test_every_public_name_exists_and_has_words_to_it() -> None:
    for name in mwtool.__all__:
        assert name in dir(mwtool)
        assert name == "__version__" or getattr(mwtool, name).__doc__
    assert sorted(mwtool.__all__) == sorted([*mwtool._HOMES, "__version__"])
    with pytest.raises(AttributeError, match="has no attribute 'scan_everything'"):
        _ = mwtool.scan_everything


def test_no_public_function_is_named_after_a_module() -> None:
    """`mwtool.scan.scanner` is the module, whether or not it was imported before."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert modules & set(mwtool.__all__) == set()
