"""The page in a browser: quiet, whole, within the window, legible, in both colour schemes. Needs Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browsing, chromium
from every_document import every_document

from mwtool.report.page import page_of

PROGRAM = chromium()
pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed (on Debian: apt-get install chromium)"),
    pytest.mark.xdist_group("browser"),  # one browser serves all
]
EVIL = 'owner/<script>console.log("run")</script><img src=x onerror=console.log(1)>' + "averylongname" * 9
WINDOWS = [
    (width, scheme, "screen") for width in (380, 1400) for scheme in ("light", "dark")
] + [(718, "light", "print")]  # fmt: skip # A4 within its margins
FIGURES = """[...document.querySelectorAll('figure svg, img')].map(one => {
  const box = one.getBoundingClientRect();
  const drawn = one.getBBox ? one.getBBox().width * one.getBBox().height : one.naturalWidth;
  return [box.width, box.height, drawn];
})"""
WIDER = """[...document.querySelectorAll('body *')].filter(one => {
  const scrolls = one.closest('.wide') && getComputedStyle(one.closest('.wide')).overflowX === 'auto';
  const within = scrolls && !one.matches('.wide');
  return !within && !one.matches('.skip') && one.getBoundingClientRect().right > innerWidth + 1;
}).map(one => one.outerHTML.slice(0, 80))"""
CUT_TEXT = """[...document.querySelectorAll('figure svg text')].filter(one => {
  const box = one.getBoundingClientRect(), svg = one.ownerSVGElement.getBoundingClientRect();
  return box.left < svg.left - 3 || box.right > svg.right + 3 || box.top < svg.top - 3 || box.bottom > svg.bottom + 3;
}).map(one => one.textContent)"""
CONTRAST = """(() => {
  const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = one => {
    for (let at = one; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
  };
  return [...document.querySelectorAll('body *')]
    .filter(one => [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
    .map(one => {
      const own = getComputedStyle(one), svg = one.ownerSVGElement;
      const [a, b] = [light(svg ? own.fill : own.color), light(behind(one))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), one.textContent.slice(0, 40)];
    }).filter(one => one[0] < 4.5);
})()"""
HEADINGS = "[...document.querySelectorAll('h1, h2, h3, h4')].map(one => Number(one.tagName[1]))"
UNREACHABLE = """[...document.querySelectorAll('body *')].filter(one =>
  ['auto', 'scroll'].includes(getComputedStyle(one).overflowX) && one.tabIndex < 0).length"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    path = folder / "page.html"
    path.write_text(page_of(every_document(folder, EVIL)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with browsing(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize(("width", "scheme", "media"), WINDOWS)
def test_the_page_is_quiet_whole_and_within_the_window(
    browser: Browser, page: Path, width: int, scheme: str, media: str
) -> None:
    browser.open(page, width=width, scheme=scheme, media=media)
    assert browser.value("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    figures = browser.value(FIGURES)
    assert len(figures) == 10
    assert all(side > 0 for figure in figures for side in figure)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(WIDER) == []
    assert browser.value(CUT_TEXT) == []
    assert browser.reported("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded") == []
    asked = [one["request"]["url"] for one in browser.reported("Network.requestWillBeSent")]
    assert [url for url in asked if url != page.resolve().as_uri() and not url.startswith("data:")] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Browser, page: Path, scheme: str) -> None:
    browser.open(page, width=1400, scheme=scheme)
    assert browser.value(CONTRAST) == []


def test_readers_and_keyboards_find_everything(browser: Browser, page: Path) -> None:
    browser.open(page, width=380)
    levels = browser.value(HEADINGS)
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert browser.value(UNREACHABLE) == 0
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    images: Any = roles.get("image", []) + roles.get("img", [])
    assert len(images) == 10
    for role in ("region", "table", "navigation", "link", "heading"):
        assert all(name.strip() for name in roles[role]), role
    assert all(map(str.strip, images))
    assert "main" in roles


def test_the_checks_see_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    """A page that logs, asks for a file, is too wide and has an empty figure and grey text is found out."""
    wrong = tmp_path / "wrong.html"
    wrong.write_text(
        "<body style='background: white'><script>console.log('here')</script><script src='none.js'></script>"
        "<div style='width: 900px; color: #aaa'>wide</div><figure><svg width=0 height=9></svg></figure>"
        "<figure><svg width=50 height=20><text x=40 y=10>beyond the edge</text></svg></figure></body>"
    )
    browser.open(wrong, width=380)
    assert browser.reported("Runtime.consoleAPICalled")
    assert len(browser.reported("Network.requestWillBeSent")) >= 2
    assert len(browser.value(WIDER)) >= 1
    assert browser.value(FIGURES)[0][0] == 0
    assert browser.value(CUT_TEXT) == ["beyond the edge"]
    assert browser.value(CONTRAST)[0][1] == "wide"
