"""The ``hscore`` metric module, instantiated and loaded by path."""

from pathlib import Path

import numpy as np
import pytest

from entprop_wrap.errors import DataError

evaluate = pytest.importorskip("evaluate")

SCRIPT = Path(__file__).parents[2] / "integrations" / "hscore.py"


@pytest.fixture
def rows():
    random = np.random.default_rng(0)
    names = ["clean"] * 40 + ["fog 1"] * 40 + ["fog 2"] * 20
    return {
        "predictions": random.integers(0, 3, 100).tolist(),
        "references": random.integers(0, 3, 100).tolist(),
        "conditions": names,
    }


def expected(rows):
    right = {}
    for p, r, c in zip(*rows.values(), strict=True):
        right.setdefault(c, []).append(p == r)
    means = {name: sum(values) / len(values) for name, values in right.items()}
    sa, ra = means["clean"], (means["fog 1"] + means["fog 2"]) / 2
    return {"sa": pytest.approx(sa), "ra": pytest.approx(ra), "hscore": pytest.approx(2 * sa * ra / (sa + ra))}


@pytest.fixture(params=["instance", "path"])
def metric(request, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    if request.param == "path":
        return evaluate.load(str(SCRIPT), cache_dir=str(tmp_path))
    from entprop_wrap.integrations.hscore import Hscore

    return Hscore(cache_dir=str(tmp_path))


def test_conditions_count_alike(metric, rows):
    assert metric.compute(**rows) == expected(rows)


def test_batches_add_up(metric, rows):
    for start in range(0, 100, 30):
        metric.add_batch(**{key: values[start : start + 30] for key, values in rows.items()})
    assert metric.compute() == expected(rows)


@pytest.mark.parametrize("condition", ["clean", "fog 1"])
def test_one_condition_gives_no_score(metric, condition):
    with pytest.raises(DataError, match="'clean' and in at least one other"):
        metric.compute(predictions=[1], references=[1], conditions=[condition])
