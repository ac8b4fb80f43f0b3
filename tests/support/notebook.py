"""Notebooks whose code cells are run without Jupyter: what each cell prints, and what its last expression shows.

`python tests/support/notebook.py FILE...` runs the cells again and writes their outputs into the files.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PNG, HTML, PLAIN = "image/png", "text/html", "text/plain"


def cells_of(path: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def outputs_of(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Run the code cells one after the other: the outputs of each, as a notebook keeps them."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells_of(path), 1):
        printed = io.StringIO()
        with redirect_stdout(printed):
            value = _run("".join(cell["source"]), names)
        found: list[dict[str, Any]] = []
        if printed.getvalue():
            found.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
        if value is not None:
            data = _shown(value)
            found.append(
                {"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}}
            )  # fmt: skip
        yield found


def refresh(path: Path) -> None:
    """Run the cells and write their outputs into the file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(cells, outputs_of(path), strict=True), 1):
        cell |= {"execution_count": number, "outputs": outputs}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _run(source: str, names: dict[str, Any]) -> Any:
    """Run one cell; the value of the expression that ends it. Lines that begin with % are Jupyter's own."""
    tree = ast.parse("\n".join("" if line.startswith("%") else line for line in source.splitlines()))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def _shown(value: Any) -> dict[str, Any]:
    if isinstance(value, Figure):
        drawn = io.BytesIO()
        value.savefig(drawn, format="png", dpi=100)
        size = value.get_size_inches() * value.dpi
        plain = f"<Figure size {size[0]:.0f}x{size[1]:.0f} with {len(value.axes)} Axes>"
        return {PNG: base64.b64encode(drawn.getvalue()).decode(), PLAIN: [plain]}
    html = {} if not hasattr(value, "_repr_html_") else {HTML: _lines(value._repr_html_())}
    return {**html, PLAIN: _lines(repr(value))}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        refresh(Path(name))
