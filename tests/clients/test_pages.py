"""The diffs of docs/clients are diffs, and the pages say how long they are."""

import re
import shutil

import pytest

from tests.helpers.in_process import load

HUNK = re.compile(r"^@@ -(\d+),\d+ \+\d+,\d+ @@.*\n", re.MULTILINE)


@pytest.fixture
def benchmark(monkeypatch):
    return load("benchmarks/clients.py", monkeypatch)


def before(diff):
    """(name, text) of each file as far as its diff shows it, with empty lines in between."""
    for part in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
        name, lines = part.partition("\n")[0], []
        _, *hunks = HUNK.split(part)
        for start, hunk in zip(hunks[::2], hunks[1::2], strict=True):
            lines += [""] * (int(start) - 1 - len(lines))
            lines += [line[1:] for line in hunk.splitlines() if not line.startswith("+")]
        yield name, "\n".join(lines) + "\n"


@pytest.mark.skipif(shutil.which("patch") is None, reason="patch is not installed")
def test_the_diffs_apply(benchmark, tmp_path):
    for name, client in benchmark.CLIENTS.items():
        if name == "lightning":
            continue
        diff = benchmark.blocks(client.page, "diff")[client.diff]
        for file, text in before(diff):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        benchmark.apply(diff, tmp_path / name)
        assert any("entprop" in file.read_text() for file in (tmp_path / name).rglob("*.py"))


def test_the_pages_say_how_many_lines_change(benchmark):
    table = (benchmark.PAGES / "README.md").read_text()
    for name, client in benchmark.CLIENTS.items():
        if name != "lightning":
            lines = benchmark.count_lines(benchmark.blocks(client.page, "diff")[client.diff])
            assert f"| {lines} |" in table, name
            assert f"{lines} lines" in (benchmark.PAGES / f"{client.page}.md").read_text(), name
