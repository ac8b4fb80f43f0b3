"""A matplotlib figure as SVG inside an HTML page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from mwtool.files.figure import INK, styled, with_stable_ids

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inline_svg(figure: Figure, prefix: str) -> str:
    """The figure as an `<svg>` element, whose ink has the colour of the text around it.

    prefix: put before every id, since ids are shared by all figures of a page. Text stays text, so that it can be
    searched and read aloud; its width is that of matplotlib's font, which is wider than those of browsers.
    """
    import matplotlib as mpl

    drawn = io.StringIO()
    with styled(), mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = with_stable_ids(drawn.getvalue())
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 aria-hidden="true" focusable="false"', svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\1{prefix}-", svg)
    return svg.replace(INK, "currentColor")
