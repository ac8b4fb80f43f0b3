"""Docstrings of public functions say what they raise and give the shapes of tensors; records are built by keyword."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNDOCUMENTED = {"cli", "demo"}
"""A command's docstring is its help; the modules of demo are scripts."""
FOLDERS = (
    "files", "architecture", "models", "scan", "surgery", "macdrop", "evaluation", "ablation", "quantization", "report",
    "finetune", "reproduction", "testing",
    "demo", "cli",
)  # fmt: skip
"""Every folder of the package; what lies beside them is held to the same."""
TENSORS = re.compile(r"\b(Tensor|DTensor)\b")
SHAPE = re.compile(r"\((\.\.\.|\d*[A-Z]'?|in|out|\d+)(,| \*|\))")
"""The beginning of a shape: (B, T), (..., H), (I,), (2I, H), (out, in)."""
LONGEST = 55
"""Lines of the body of a function: it fits on a screen."""
MOST_POSITIONAL = 4
"""Fields that a record may take by position."""
POSITIONAL = {
    "DecoderLayer",  # plugins build them, by position too: their signatures are a contract
    "FFN",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def files_of(folder: str) -> list[Path]:
    return sorted((ROOT / "mwtool" / folder).rglob("*.py")) if folder else sorted((ROOT / "mwtool").glob("*.py"))


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Every function and method with its name as `file.py: Class.method`, those within functions left out."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Function):
            yield f"{path.name}: {node.name}", node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, Function):
                    yield f"{path.name}: {node.name}.{inner.name}", inner


def public(folder: str) -> list[tuple[str, Function]]:
    """Public functions and methods of public classes: those whose docstrings other modules read."""
    found = [one for path in files_of(folder) for one in functions(path)]
    return [(name, node) for name, node in found if not re.search(r"[ .]_", name)]


def own(node: ast.AST) -> Iterator[ast.AST]:
    """What a function consists of, functions and classes within it left out."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            yield child
            yield from own(child)


def raises(node: Function) -> bool:
    """Whether the function itself raises an error that a caller should know of."""
    statements = [one for one in own(node) if isinstance(one, ast.Raise) and one.exc is not None]
    return any(not re.match(r"(AssertionError|_\w+)\b", ast.unparse(one.exc)) for one in statements if one.exc)


def annotations(node: Function) -> str:
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    found = [argument.annotation for argument in arguments] + [node.returns]
    return " ".join(ast.unparse(one) for one in found if one is not None)


def takes_tensors(node: Function) -> bool:
    return bool(TENSORS.search(annotations(node)))


@pytest.mark.parametrize("folder", [one for one in (*FOLDERS, "") if one not in UNDOCUMENTED])
def test_public_functions_that_raise_say_so(folder: str) -> None:
    found = [(name, ast.get_docstring(node) or "") for name, node in public(folder) if raises(node)]
    assert [name for name, text in found if text and not re.search(r"\b[Rr]aises?\b", text)] == []


@pytest.mark.parametrize("folder", [one for one in (*FOLDERS, "") if one not in UNDOCUMENTED])
def test_public_functions_with_tensors_give_shapes(folder: str) -> None:
    found = [(name, ast.get_docstring(node) or "") for name, node in public(folder) if takes_tensors(node)]
    assert [name for name, text in found if text and not SHAPE.search(text)] == []


@pytest.mark.parametrize("folder", [*FOLDERS, ""])
def test_functions_fit_on_a_screen(folder: str) -> None:
    """Without docstring and parameters, which document a command."""
    long = []
    for path in files_of(folder):
        for name, node in functions(path):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > LONGEST:
                long.append(f"{name}, {lines} lines")
    assert long == []


@pytest.mark.parametrize("folder", [*FOLDERS, ""])
def test_records_of_more_than_four_fields_are_built_by_keyword(folder: str) -> None:
    positional = []
    for path in files_of(folder):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or node.name in POSITIONAL:
                continue
            decorators = [ast.unparse(one) for one in node.decorator_list if "dataclass" in ast.unparse(one)]
            fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and "ClassVar" not in ast.unparse(one)]
            taken = [one for one in fields if "init=False" not in ast.unparse(one)]
            if decorators and "kw_only=True" not in decorators[0] and len(taken) > MOST_POSITIONAL:
                positional.append(f"{path.name}: {node.name}, {len(taken)} fields")
    assert positional == []


def test_every_folder_is_held_to_it() -> None:
    assert {path.parent.name for path in (ROOT / "mwtool").glob("*/__init__.py")} == set(FOLDERS)


def test_the_rules_find_what_they_are_for() -> None:
    """On functions made for it: a rule that finds nothing would pass above whatever the code says."""
    source = (
        "def silent(x: Tensor) -> None:\n    raise BadValue(x)\n"
        "def inner() -> int:\n    def stop() -> None:\n        raise ValueError\n    return stop\n"
    )
    silent, inner = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert (raises(silent), takes_tensors(silent)) == (True, True)
    assert (raises(inner), takes_tensors(inner)) == (False, False)
    assert all(
        SHAPE.search(text) for text in ("(B, T)", "x: (..., H).", "(I,)", "(2I, H)", "(out, in)", "(1, T)", "(T')")
    )
    assert not any(SHAPE.search(text) for text in ("(None)", "(see the paper)", "(64 MB)", "(on a CPU)", "(a, b)"))
