"""benchmarks/ablate.py on tiny settings: each sweep, killed and resumed, and what it says of bad input."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from entprop_wrap import EntProp
from entprop_wrap.methods import Vanilla
from tests.helpers.in_process import ROOT, call, load

TINY = ["--epochs", 1, "--seeds", 2, "--robustness-images", 8, "--severities", 3, "--batch-size", 16, "--max-train", 32]

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")


@pytest.fixture
def ablate(monkeypatch):
    return load("benchmarks/ablate.py", monkeypatch)


def rows(output):
    return [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]


def keys(output):
    return [json.dumps([row["settings"], row["seed"]], sort_keys=True) for row in rows(output)]


def test_a_sweep_that_was_killed_goes_on_where_it_was(ablate, monkeypatch, tmp_path, capfd):
    output = tmp_path / "out"
    arguments = ["k", "--values", 0.2, 0.4, 0.6, 0.8, *TINY, "--output", output]
    command = [sys.executable, str(ROOT / "benchmarks" / "ablate.py"), *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    end = time.monotonic() + 120
    while not ((output / "runs.jsonl").exists() and len(keys(output)) >= 2) and time.monotonic() < end:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = keys(output)
    assert 2 <= len(done) < 20

    capfd.readouterr()
    call(ablate, monkeypatch, *arguments, "--list")
    left = capfd.readouterr().out
    assert left.count("seeds left: [0, 1]") == 5  # nothing is evaluated yet
    assert keys(output) == done

    call(ablate, monkeypatch, *arguments)
    assert keys(output)[: len(done)] == done
    assert len(keys(output)) == len(set(keys(output))) == 20  # vanilla and four k, two seeds: trained, and evaluated
    printed = capfd.readouterr().out
    assert re.search(r"^\| 0.8 \| 2 \| .* \| 1.81 \|", printed, re.MULTILINE)
    assert (output / "k.md").read_text() in printed
    assert (output / "k.png").stat().st_size > 5000

    call(ablate, monkeypatch, *arguments)
    assert len(keys(output)) == 20
    call(ablate, monkeypatch, *arguments, "--list")
    assert capfd.readouterr().out.count("seeds left: none") == 5


def test_smaller_data_is_a_part_of_the_larger_and_takes_as_many_steps(ablate, monkeypatch, tmp_path):
    output = tmp_path / "out"
    call(ablate, monkeypatch, "data", "--values", 0.25, 1, *TINY, "--max-train", 80, "--output", output)
    table = (output / "data.md").read_text()
    assert re.search(r"^\| EntProp, 25 % \| 2 ", table, re.MULTILINE)
    assert "vanilla training on as many images" in table
    trained = [row for row in rows(output) if set(row["settings"]) == {"train"}]
    assert {row["settings"]["train"]["recipe"]["share"] for row in trained} == {0.25, 1.0}

    from settings import part_of

    whole = torch.utils.data.TensorDataset(torch.rand(100, 1), torch.arange(100) % 4)
    for share, number in ((0.05, 4), (0.2, 20), (1.0, 100)):
        part = part_of(whole, share)
        assert len(part) == number
        labels = torch.tensor([int(label) for _, label in part])
        assert labels.bincount().tolist() == [number / 4] * 4
    small, large = (set(part_of(whole, share).indices) for share in (0.2, 0.6))
    assert small < large


def test_every_sweep_changes_what_it_says(ablate):
    recipe, base = ablate.Recipe(), EntProp(epsilon=0.1)
    found = {name: ablate.settings(name, None, recipe, base) for name in (*ablate.OPTIONS, "data")}
    changed = {
        "k": "fraction",
        "n": "attack_steps",
        "threshold": "threshold",
        "metric": "uncertainty",
        "norms": "auxiliary",
    }
    for name, field in changed.items():
        values = [getattr(one.method, field) for row, one in found[name].items() if row != "vanilla"]
        assert len(set(values)) == len(values) > 1
        assert found[name]["vanilla"].method == Vanilla()
    assert found["norms"]["shared"].method.auxiliaries == ()
    assert {(type(one.method.mix), one.method.mix_on) for one in list(found["mixing"].values())[1:4]} == {
        (ablate.MixUp, "batch"),
        (ablate.MixUp, "auxiliary"),
        (ablate.CutMix, "batch"),
    }
    assert all(one.method.epsilon == 0.1 for one in list(found["mixing"].values())[1:])
    assert [one.recipe.share for one in found["data"].values()][:4] == [0.05, 0.05, 0.1, 0.1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["k", "n", "--values", 1], "one sweep"),
        (["k", "--values", "half"], "numbers"),
        (["metric", "--values", "entropie"], "'entropy'"),
        (["data", "--values", 5], r"\(0, 1\]"),
        (["depth"], "invalid choice"),
    ],
)
def test_bad_input_says_what_was_expected(ablate, monkeypatch, capfd, arguments, message):
    with pytest.raises(SystemExit):
        call(ablate, monkeypatch, *arguments)
    assert re.search(message, capfd.readouterr().err)
