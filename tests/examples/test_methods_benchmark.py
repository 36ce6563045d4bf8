"""benchmarks/methods.py on tiny settings: tables are trained once, and every row is a command line that can be read."""

import re

import pytest

from entprop_wrap.cli import methods, results
from entprop_wrap.cli.options import parse
from tests.helpers.in_process import call, load

TINY = ["--epochs", 4, "--batch-size", 8, "--max-train", 16, "--robustness-images", 4, "--severities", 3]

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(results, "page", lambda *_: None)  # it takes the longest
    return load("benchmarks/methods.py", monkeypatch)


def test_a_table_is_trained_once(benchmark, monkeypatch, tmp_path, capfd):
    arguments = ["--rows", "MixProp", "vanilla, trained on", "--seeds", 1, *TINY, "--output", tmp_path]
    call(benchmark, monkeypatch, *arguments, "--report")
    assert "Nothing is done yet." in capfd.readouterr().out

    call(benchmark, monkeypatch, *arguments)
    first = capfd.readouterr().out.partition("Table methods")[2]
    assert re.search(r"^\| vanilla \| 1 \| [\d.]+ \|.* 1.00 \| 1.00 \|$", first, re.MULTILINE)
    assert re.search(r"^\| MixProp \| 1 \| [\d.]+ \|.*[+-][\d.]+ \|.* 2.00 \|", first, re.MULTILINE)
    assert "vanilla, trained on" in first

    monkeypatch.setattr(benchmark, "train", None)  # nothing is trained again
    call(benchmark, monkeypatch, *arguments)
    assert capfd.readouterr().out.partition("Table methods")[2] == first
    with pytest.raises(SystemExit, match=r"made with other options \(batch_size\)"):
        call(benchmark, monkeypatch, *arguments, "--batch-size", 4)
    with pytest.raises(SystemExit):
        call(benchmark, monkeypatch, *arguments, "--rows", "Mixprop")


def test_every_row_is_a_command_line_of_its_own(benchmark):
    for rows in benchmark.TABLES.values():
        assert len(set(rows.values())) == len(rows)
        for arguments in rows.values():
            options = parse("", ["--weights", "any", "--methods", *arguments.removesuffix(" again").split()])
            (method,) = methods.build(options).values()
            assert getattr(method, "epsilon", 0.1) == 0.1
