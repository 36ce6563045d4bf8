"""benchmarks/recipes.py on tiny settings: runs are done once, suites are added to them, and tables pair the seeds."""

import argparse
import json
import re
from dataclasses import replace

import pytest

from tests.helpers.in_process import ROOT, call, load

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")


@pytest.fixture
def benchmark(monkeypatch):
    script = load("benchmarks/recipes.py", monkeypatch)
    monkeypatch.setitem(script.REGIMES, "digits", replace(script.REGIMES["digits"], epochs=1, tested=2))
    return script


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_runs_are_done_once_and_evaluated_again_from_their_weights(benchmark, monkeypatch, tmp_path, capsys):
    runs, page = tmp_path / "runs.jsonl", tmp_path / "page.md"
    page.write_text("before\n<!-- recipes -->\nstale\n<!-- /recipes -->\nafter\n")
    rows = ["--rows", "vanilla", "EntProp, statistics", "--augment", "trivialaugment"]
    arguments = ["--runs", runs, "--seeds", 0, *rows, "--keep", tmp_path / "weights"]
    call(benchmark, monkeypatch, *arguments)
    first = lines(runs)
    assert [line["row"] for line in first] == ["vanilla", "EntProp, statistics"]
    assert all(0 <= line[score] <= 1 for line in first for score in ("sa", "ra", "hscore"))
    assert first[1]["config"]["copies"] == "statistics"
    assert first[0]["steps"] == 4

    monkeypatch.setattr(benchmark, "train", None)  # nothing is trained again
    call(benchmark, monkeypatch, *arguments)
    assert lines(runs) == first
    call(benchmark, monkeypatch, *arguments, "--suites", "c-bar")
    assert [set(line) & {"ra", "ra_bar"} for line in lines(runs)[2:]] == [{"ra_bar"}] * 2

    capsys.readouterr()
    call(benchmark, monkeypatch, *arguments, "--tables", "--write", page)
    table = capsys.readouterr().out
    assert table.startswith("**digits, trivialaugment**")
    assert f"| EntProp, statistics | 1 | {100 * first[1]['sa']:.1f} |" in table
    assert page.read_text() == f"before\n<!-- recipes -->\n{table.rstrip()}\n<!-- /recipes -->\nafter\n"


def test_differences_are_paired_by_seed(benchmark):
    def run(score):
        return {"sa": score, "ra": score, "hscore": score, "seconds": 10 * score, "loading_seconds": score}

    rows = {
        "vanilla": {0: run(0.5), 1: run(0.7), 2: run(0.6)},
        "EntProp": {0: run(0.51), 1: run(0.73), 5: run(0.1)},
    }
    line = benchmark.table("title", rows, "vanilla").splitlines()[-1]
    # Two pairs: 1 and 3 points, t(0.975, 1) = 12.706.
    assert line.count("+2.0 ± 12.7") == 3
    assert "| 3 |" in line
    assert line.endswith("| 10% |")


def test_the_page_says_what_the_runs_say_and_the_readme_what_the_page_says(benchmark):
    options = argparse.Namespace(versus="vanilla", explore=False)
    page, readme = ((ROOT / name).read_text() for name in ("docs/recipes.md", "README.md"))
    runs = benchmark.Runs(ROOT / "benchmarks" / "recipes" / "runs.jsonl")
    assert f"<!-- recipes -->\n{benchmark.tables(runs, options).rstrip()}\n<!-- /recipes -->" in page
    measured = readme.partition("## What was measured")[2].partition("Digits:")[0]
    rows = re.findall(r"^\| .*?(\| \d .*) \| [\d.]+ \|$", measured, re.MULTILINE)
    assert len(rows) == 8
    for row in rows:  # the number of seeds, and four scores or differences
        seeds, numbers = row.split(" | ", 1)
        assert re.search(rf"{re.escape(seeds)} \|[^\n]*{re.escape(numbers)} \|", page), row


def test_rows_see_the_same_images(benchmark, monkeypatch, tmp_path):
    options = type("Options", (), {"explore": False})()
    task = benchmark.Task(benchmark.REGIMES["digits"], options)
    seen = []
    step = benchmark.entprop.training_step

    def watched(model, images, labels, **arguments):
        seen[-1].append(images.clone())
        return step(model, images, labels, **arguments)

    monkeypatch.setattr(benchmark.entprop, "training_step", watched)
    for name in ("vanilla", "EntProp", "FastAdvProp"):
        seen.append([])
        benchmark.train(task, benchmark.ROWS[name], "trivialaugment", seed=3)
    assert all(bool((a == b).all()) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
