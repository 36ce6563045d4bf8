"""benchmarks/run_table.py: rows by settings and seed, in a file that survives a crash."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from entprop_wrap import EntProp, MixUp
from entprop_wrap.functional import uncertainty
from tests.helpers.in_process import load


@pytest.fixture
def run_table(monkeypatch):
    return load("benchmarks/run_table.py", monkeypatch)


@pytest.fixture
def table(run_table, tmp_path):
    return run_table.RunTable(tmp_path / "folder" / "runs.jsonl")


def test_rows_are_found_again_by_another_process(run_table, table):
    assert table.find({"method": EntProp()}, 0) is None
    table.add({"method": EntProp()}, 0, {"sa": 0.5})
    table.add({"method": EntProp()}, 1, {"sa": 0.25})
    again = run_table.RunTable(table.path)
    assert len(again) == 2
    assert again.find({"method": EntProp(fraction=0.2, mix=MixUp(1.0))}, 1) == {"sa": 0.25}
    assert [row["seed"] for row in again] == [0, 1]


@pytest.mark.parametrize(
    "changed",
    [
        EntProp(fraction=0.3),
        EntProp(mix=MixUp(0.2)),
        EntProp(mix=None),
        EntProp(uncertainty=uncertainty.random),
        EntProp(epsilon=0.1),
    ],
)
def test_a_changed_setting_is_another_row(table, changed):
    table.add({"method": EntProp(), "epochs": 3}, 0, {})
    assert table.find({"method": changed, "epochs": 3}, 0) is None
    assert table.find({"method": EntProp(), "epochs": 4}, 0) is None
    assert table.find({"epochs": 3, "method": EntProp()}, 0) == {}  # the order of keys means nothing


def test_two_classes_with_equal_fields_are_two_settings(run_table):
    @dataclass(frozen=True)
    class One:
        weight: float = 1.0

    @dataclass(frozen=True)
    class Two:
        weight: float = 1.0

    assert run_table.key_of({"method": One()}, 0) != run_table.key_of({"method": Two()}, 0)


def test_functions_are_told_apart_by_name_and_not_by_address(run_table):
    described = run_table.plain({"uncertainty": uncertainty.entropy})
    assert described == {"uncertainty": "entprop_wrap.functional.uncertainty.entropy"}


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_last_line_that_was_cut_off_is_done_again(run_table, table, cut):
    for seed in range(3):
        table.add({"name": "a setting of some length"}, seed, {"seed": seed})
    table.path.write_bytes(table.path.read_bytes()[:-cut])
    if cut == 1:  # only the line feed is gone
        again = run_table.RunTable(table.path)
        assert len(again) == 3
    else:
        with pytest.warns(UserWarning, match="line 3 is damaged"):
            again = run_table.RunTable(table.path)
        assert len(again) == 2
    again.add({"name": "another"}, 0, {"seed": 7})
    lines = table.path.read_text().splitlines()
    assert json.loads(lines[-1])["result"] == {"seed": 7}  # on a line of its own
    assert json.loads(lines[0])["result"] == {"seed": 0}


def test_what_json_cannot_hold_is_refused_before_it_is_written(table):
    with pytest.raises(ValueError, match="JSON"):
        table.add({}, 0, {"loss": float("nan")})
    assert not table.path.exists()


def test_a_row_that_is_done_again_takes_the_place_of_the_first(run_table, table):
    table.add({}, 0, {"sa": 0.1})
    table.add({}, 0, {"sa": 0.2})
    assert table.find({}, 0) == run_table.RunTable(table.path).find({}, 0) == {"sa": 0.2}


def test_several_writers_do_not_mix_their_lines(run_table, table):
    def write(seed):
        run_table.RunTable(table.path).add({"text": "x" * 5000}, seed, {"seed": seed})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    again = run_table.RunTable(table.path)
    assert {row["result"]["seed"] for row in again} == set(range(40))
