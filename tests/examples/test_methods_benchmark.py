"""benchmarks/methods.py on tiny settings: every method takes a step, and a table is made, resumed and written."""

import json
import re

import pytest

from entprop_wrap.methods import Vanilla
from tests.helpers.in_process import call, load

TINY = ["--epochs", 1, "--seeds", 2, "--images", 8, "--severities", 3, "--rounds", 2]

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")


@pytest.fixture
def benchmark(monkeypatch):
    return load("benchmarks/methods.py", monkeypatch)


def test_a_table_is_trained_once_and_written_into_a_page(benchmark, monkeypatch, tmp_path, capfd):
    output, page = tmp_path / "out", tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n\n<!-- digits-table7 -->\nstale\n<!-- /digits-table7 -->\n\nafter\n")
    arguments = ["--tables", 7, *TINY, "--output", output]

    call(benchmark, monkeypatch, *arguments, "--report")
    assert "10 of 10 runs are not done yet" in capfd.readouterr().out

    call(benchmark, monkeypatch, *arguments, "--attack", "8/255")
    printed = capfd.readouterr().out
    assert "under PGD-20 8/255, difference" in printed
    lines = (output / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 10 + 10 + 5  # trained, evaluated, timed

    call(benchmark, monkeypatch, *arguments)  # another evaluation of the same models
    more = [json.loads(line)["settings"] for line in (output / "runs.jsonl").read_text().splitlines()[25:]]
    assert len(more) == 10
    assert all("evaluate" in settings for settings in more)

    capfd.readouterr()
    call(benchmark, monkeypatch, *arguments, "--list")
    assert "0 of 10 runs are left" in capfd.readouterr().out
    call(benchmark, monkeypatch, *arguments, "--report", "--write", page)
    text = page.read_text()
    assert text.startswith("before\n\n<!-- digits-table7 -->\n")
    assert text.endswith("<!-- /digits-table7 -->\n\nafter\n")
    assert "stale" not in text
    assert re.search(r"^\| all \| 2 \| .* \| 1.20 \| .* \| 65.15 \|$", text, re.MULTILINE)
    assert (page.parent / "figures" / "digits-table7.png").exists()
    saved = json.loads((output / "digits-table7.json").read_text())
    assert [line["name"] for line in saved] == [
        "vanilla",
        "selection",
        "selection + MixUp",
        *("selection + free step", "all"),
    ]
    by_hand = {line["name"]: line["scores"]["RA"]["mean"] for line in saved}
    assert saved[4]["differences"]["RA"]["mean"] == pytest.approx(by_hand["all"] - by_hand["vanilla"])

    page.write_text("nothing")
    with pytest.raises(ValueError, match="<!-- digits-table7 -->"):
        call(benchmark, monkeypatch, *arguments, "--report", "--write", page)


def test_every_method_takes_a_step_and_is_a_setting_of_its_own(benchmark, tmp_path):
    runs = benchmark.sweep.Sweep(tmp_path, benchmark.sweep.Protocol(8, (3,)))
    recipe = benchmark.sweep.Recipe(batch_size=8, max_train=32)
    settings = benchmark.settings_of(benchmark.TABLES["methods"], recipe, 0.1)
    assert len(set(settings.values())) == len(settings) >= 20
    steps = [setting for setting in settings.values() if setting.start is None and not setting.grows]
    benchmark.times(runs, steps, rounds=2)
    assert len(runs.table) == len(steps)


@pytest.mark.parametrize("epsilon", [0.1, None])
def test_the_tables_hold_what_the_paper_has(benchmark, epsilon):
    recipe = benchmark.sweep.Recipe()
    for name, table in benchmark.TABLES.items():
        settings = benchmark.settings_of(table, recipe, epsilon)
        assert set(table.paper) <= set(settings), name
        for setting in settings.values():
            if hasattr(setting.method, "epsilon") and getattr(setting.method, "attack_steps", 1):
                assert setting.method.epsilon in (epsilon, 1 / 255 if epsilon is None else epsilon)
    retrained = benchmark.settings_of(benchmark.TABLES["methods"], recipe, epsilon)["EntropicRetraining"]
    assert retrained.start.method == Vanilla()
    assert retrained.recipe.epochs == 15
    assert retrained.recipe.learning_rate == pytest.approx(0.01)
