"""What MkDocs does beside rendering: pages that are files elsewhere in the repository, and links out of docs/.

In the repository every page links to the file it means, `../CHANGELOG.md` for example. On the site, a link to a file
that is a page there becomes a link to that page; of a link to any other file of the repository only the text remains.
A link to a file that does not exist is left alone, and a strict build stops there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.utils.meta import get_data

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ELSEWHERE = {
    "bundled-model.md": "mwtool/demo/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Page -> the file whose text it shows; the page itself, as the repository has it, is a pointer to that file."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text, from elsewhere where it is elsewhere, with links that lead somewhere on the site."""
    docs = Path(config.docs_dir)
    root = docs.parent
    source = docs / page.file.src_uri
    if page.file.src_uri in ELSEWHERE:
        source = root / ELSEWHERE[page.file.src_uri]
        markdown, _ = get_data(source.read_text(encoding="utf-8"))
    pages = {root / text: docs / name for name, text in ELSEWHERE.items()}
    known = {docs / file.src_uri for file in files}

    def on_the_site(found: re.Match[str]) -> str:
        text, target, anchor = found.group(1), found.group(2), found.group(3) or ""
        path = Path(os.path.normpath(source.parent / target))
        path = pages.get(path, path)
        if path in known:
            return f"[{text}]({os.path.relpath(path, (docs / page.file.src_uri).parent)}{anchor})"
        return text if path.exists() else found.group()

    return LINK.sub(on_the_site, markdown)
