"""The table of docs/works_with.md, made from the table of tests: ``python -m tests.helpers.works_with`` writes it.

A tick is a check of ``tests/wrapping/test_table.py`` that passes; there is no other source for it.
"""

import sys
from pathlib import Path

from tests.helpers.architectures import ARCHITECTURES
from tests.wrapping.test_table import BEHAVIOURS, applies

START, END = "<!-- works-with -->", "<!-- /works-with -->"
PAGE = Path(__file__).parents[2] / "docs" / "works_with.md"


def table() -> str:
    """Return the table in Markdown: one row per architecture, one column per behaviour."""
    lines = [
        f"| architecture | norm layers | {' | '.join(BEHAVIOURS)} |",
        f"|---|---|{':-:|' * len(BEHAVIOURS)}",
    ]
    for architecture in ARCHITECTURES:
        cells = ["✓" if applies(behaviour, architecture) else "-" for behaviour in BEHAVIOURS]
        lines.append(f"| {architecture.name} | {architecture.norms} | {' | '.join(cells)} |")
    return "\n".join(lines)


def block_in(text: str) -> str | None:
    """Return what stands between the markers of a page, None where there are none."""
    if START not in text or END not in text:
        return None
    return text.split(START, 1)[1].split(END, 1)[0].strip()


def updated(text: str) -> str:
    """Return a page's text with the block between its markers updated."""
    before, rest = text.split(START, 1)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    """Write the block, or print the table where the page has no markers."""
    text = PAGE.read_text(encoding="utf-8")
    if block_in(text) is None:
        sys.stdout.write(f"{START}\n\n{table()}\n\n{END}\n")
    else:
        PAGE.write_text(updated(text), encoding="utf-8")


if __name__ == "__main__":
    main()
