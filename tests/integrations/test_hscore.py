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


def test_class_indices_may_be_whole_floats_and_arrays(metric, rows):
    changed = {key: np.asarray(rows[key], dtype=dtype) for key, dtype in (("predictions", "f4"), ("references", "i8"))}
    assert metric.compute(**changed, conditions=rows["conditions"]) == expected(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictions": [0.7, 1.5]}, r"predictions must be class indices, found 0\.7 at 0"),
        ({"references": [0, 1.5]}, r"references must be class indices, found 1\.5 at 1"),
        ({"predictions": [0, float("nan")]}, "found nan at 1"),
        ({"predictions": [0, None]}, "found nan at 1"),
        ({"references": [float("inf"), 0]}, "found inf at 0"),
        *(
            ({"conditions": ["clean", bad]}, f"conditions must say .*found {bad!r}")
            for bad in ("Clean", " clean", "fog 1 ", None, " ")
        ),
        ({"conditions": ["clean", "clean"]}, "'clean' and at least one other"),
        ({"conditions": ["fog 1", "fog 1"]}, "'clean' and at least one other"),
    ],
)
def test_what_would_be_counted_wrongly_is_refused(metric, changes, message):
    good = {"predictions": [0, 1], "references": [0, 1], "conditions": ["clean", "fog 1"]}
    with pytest.raises(DataError, match=message):
        metric.compute(**{**good, **changes})
