"""Every fault in docs/reliability.md names a test, and the test is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")


def faults():
    """The rows of all tables that begin with a fault."""
    tables = re.findall(r"^\| Fault \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [row for table in tables for row in table.splitlines()]


def names_in(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_fault_names_a_test():
    assert len(faults()) > 50
    assert [row for row in faults() if not re.search(r"\| `tests/[^|]+` \|$", row)] == []


def test_every_test_that_is_named_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) == PAGE.count("tests/") - PAGE.count("-s tests/")
    assert [f"{path}::{name}" for path, name in named if name not in names_in(path)] == []
    assert all(name.startswith("test_") and Path(path).name.startswith("test_") for path, name in named)
