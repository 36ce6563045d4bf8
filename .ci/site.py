"""Hooks of the docs site: the repository's own pages join it, and links out of docs/ lead to the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: Pages of the repository's root, by their place in the site.
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root."""
    for place, name in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=_linked(text, "", config.repo_url)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Point links that leave docs/ at the repository."""
    if page.file.src_uri in PAGES:
        return markdown
    return _linked(markdown, posixpath.join("docs", posixpath.dirname(page.file.src_uri)), config.repo_url)


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles of docstrings: ``:func:`name``` is shown as a name."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):<code>~?", "<code>", html)


def _linked(text: str, folder: str, repository: str) -> str:
    """Return the text of a page of ``folder`` with its relative links as the site has them."""

    def target(match: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(folder, match[1]))
        for page, name in PAGES.items():
            if place == name:
                return f"]({posixpath.relpath(page, folder.removeprefix('docs').strip('/') or '.')}{match[2] or ''})"
        if not place.startswith("docs/"):
            return f"]({repository}/blob/main/{place}{match[2] or ''})"
        return match[0] if folder else f"]({place.removeprefix('docs/')}{match[2] or ''})"

    return re.sub(r"\]\(([^)#:\s]+)(#[^)]*)?\)", target, text)
