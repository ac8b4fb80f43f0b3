"""A matplotlib figure as SVG inside an HTML page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from mwtool.files.figure import INK, LINE, MUTED, PAPER, styled, with_stable_ids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--page)"}
"""Those that a page has in a light and a dark shade; the colours of series serve both."""


def inline_svg(figure: Figure, prefix: str) -> str:
    """The figure as an `<svg>` element, whose ink has the colours of the page around it.

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
    return re.sub("|".join(COLORS), lambda found: COLORS[found[0]], svg)
