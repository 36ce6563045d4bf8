"""HTML from nested calls, in which every string that is not markup already is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

__all__ = ["Markup", "join", "table", "tag"]

_VOID = ("br", "circle", "col", "img", "line", "meta", "path", "polyline", "rect")


class Markup(str):
    """Text that is HTML; any other string is text to be shown as it is."""

    __slots__ = ()


def tag(name: str, /, *children: str | int, **attributes: str | float) -> Markup:
    """Return an element.

    Args:
        name: Of the element.
        children: :class:`Markup` as it is, anything else escaped.
        attributes: Escaped. ``class_`` is class, and other underscores are hyphens: ``aria_label``.
    """
    parts = "".join(
        f' {_attribute(key)}="{html.escape(_plain(value), quote=True)}"' for key, value in attributes.items()
    )
    if name in _VOID and not children:
        return Markup(f"<{name}{parts}/>")
    return Markup(f"<{name}{parts}>{join(children)}</{name}>")


def join(parts: Iterable[str | int], between: str = "") -> Markup:
    """Return parts after one another; those that are not :class:`Markup` are escaped."""
    return Markup(between.join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts))


def table(
    caption: str,
    head: Iterable[str],
    rows: Iterable[Iterable[str]],
    *,
    kind: str = "plain",
    last_row_is_total: bool = False,
) -> Markup:
    """Return a table in a frame that scrolls sideways where the screen is narrow.

    Args:
        caption: What it shows; read out, and shown above.
        head: Headings of the columns.
        rows: The first cell of each is its heading. A cell may be a whole ``td``.
        kind: Class of the table.
        last_row_is_total: Set off the last row.
    """
    body = list(rows)
    lines = []
    for number, (heading, *cells) in enumerate(body):
        total = last_row_is_total and number == len(body) - 1
        cells = [cell if cell.startswith("<td") and isinstance(cell, Markup) else tag("td", cell) for cell in cells]
        options: dict[str, str] = {"class_": "total"} if total else {}
        lines.append(tag("tr", tag("th", heading, scope="row"), *cells, **options))
    found = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
        tag("tbody", *lines),
        class_=kind,
    )
    # A region that can be scrolled must be reachable by keyboard.
    return tag("div", found, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _attribute(key: str) -> str:
    if key in ("viewBox", "preserveAspectRatio"):
        return key
    return key.rstrip("_").replace("_", "-")


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
