"""Scores, results and comparisons, against loops over single images and published numbers."""

import json
import math
import pickle
from dataclasses import replace

import pytest
import torch

from entprop_wrap.errors import ConfigurationError, DataError
from entprop_wrap.robustness import CORRUPTIONS, Estimate, RobustnessResult, Scores, compare, hscore
from entprop_wrap.robustness.scores import Tally
from entprop_wrap.utils.statistics import t_critical


def naive_scores(logits, labels):
    count, bins = len(labels), {}
    right, loss, by_class = 0, 0.0, {}
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total = math.fsum(math.exp(v) for v in row)
        predicted = max(range(len(row)), key=row.__getitem__)
        confidence = math.exp(row[predicted]) / total
        hit = predicted == label
        right += hit
        loss += math.log(total) - row[label]
        by_class.setdefault(label, []).append(hit)
        bins.setdefault(min(math.ceil(confidence * 15), 15), []).append((confidence, hit))
    error = 0.0
    for members in bins.values():
        mean_confidence = sum(c for c, _ in members) / len(members)
        mean_accuracy = sum(h for _, h in members) / len(members)
        error += len(members) / count * abs(mean_confidence - mean_accuracy)
    mean_class = sum(sum(hits) / len(hits) for hits in by_class.values()) / len(by_class)
    return Scores(count, right / count, mean_class, loss / count, error)


def result(accuracies, sa=0.8, conditions=None, **options):
    conditions = conditions or [(name, s) for name in ("fog", "snow") for s in (1, 3)]
    corrupted = {key: Scores(10, a, a, 1.0, 0.1) for key, a in zip(conditions, accuracies, strict=True)}
    return RobustnessResult(Scores(10, sa, sa, 0.5, 0.05), corrupted, **options)


@pytest.mark.parametrize(
    ("sa", "ra", "expected"),
    [(79.30, 51.01, 62.08), (92.24, 49.97, 64.82), (80.62, 60.50, 69.12), (89.56, 75.39, 81.87)],
)
def test_hscore_is_that_of_the_paper(sa, ra, expected):
    assert round(hscore(sa, ra), 2) == pytest.approx(expected, abs=0.011)


def test_hscore_at_its_edges():
    assert hscore(0, 0) == 0
    assert hscore(0.5, 0.5) == 0.5
    assert hscore(50, 0) == hscore(0, 0.5) == 0
    assert hscore(1, 1) == 1
    assert hscore(1.5, 2) == pytest.approx(6 / 3.5)
    for bad in (-0.1, float("nan"), float("inf"), 101, None, "0.5", True):
        for pair in ((bad, 0.5), (0.5, bad)):
            with pytest.raises(ConfigurationError, match="at least 0"):
                hscore(*pair)
    for sa, ra in ((50, 0.5), (0.5, 50), (1.5, 0.2), (1, 50)):  # percent and a fraction
        with pytest.raises(ConfigurationError, match=f"one unit, found sa={sa} and ra={ra}"):
            hscore(sa, ra)


@pytest.mark.parametrize("parts", [1, 4])
def test_tally_equals_a_loop_over_images(parts):
    logits, labels = 3 * torch.randn(203, 6), torch.randint(0, 4, (203,))  # classes 4 and 5 do not occur
    logits[0] = torch.tensor([60.0, 0, 0, 0, 0, 0])  # confidence 1 belongs to the last bin
    tallies = [Tally(6) for _ in range(parts)]
    for i, (some, own) in enumerate(zip(logits.split(17), labels.split(17), strict=True)):
        tallies[i % parts].add(some, own)
    found, expected = Tally.scores([t.state() for t in tallies]), naive_scores(logits.double(), labels)
    assert found.images == expected.images
    assert found.accuracy == expected.accuracy
    for name in ("mean_class_accuracy", "loss", "calibration_error"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12)


def test_tally_counts_unusable_logits_and_refuses_to_score_nothing():
    tally = Tally(3)
    with pytest.raises(DataError, match="empty"):
        Tally.scores([tally.state()])
    with pytest.raises(DataError, match="empty"):
        Tally.scores([])
    tally.add(torch.tensor([[0, 1, float("nan")], [0, 1, 2.0], [0, float("inf"), 0]]), torch.tensor([0, 1, 2]))
    assert tally.unusable == 2


def test_ra_is_the_plain_mean_and_says_over_what():
    found = result([0.7, 0.5, 0.6, 0.2])
    assert found.ra == pytest.approx(0.5)
    assert found.hscore == pytest.approx(2 * 0.8 * 0.5 / 1.3)
    assert found.per_corruption == pytest.approx({"fog": 0.6, "snow": 0.4})
    assert found.per_severity == pytest.approx({1: 0.65, 3: 0.35})
    assert (
        found.protocol
        == "10 images, seed 0, fog, snow x severity 1, 3 - another protocol, not comparable with a full RA"
    )
    assert found.protocol in found.to_markdown()
    every = [(name, s) for name in CORRUPTIONS for s in range(1, 6)]
    full = result([0.5] * 75, conditions=every)
    assert full.protocol == "10 images, seed 0, 15 corruptions x 5 severities"
    some = result([0.5] * 15, conditions=every[::5])
    assert ", 15 corruptions x severity 1 - another protocol" in some.protocol


def test_results_survive_json_and_pickle():
    found = result(
        [0.1, 1 / 3, 0.6, 0.2],
        seed=3,
        shifts={"sketch": Scores(5, 0.2, 0.2, 1, 0)},
        adversarial={"PGD": Scores(10, 0.1, 0.1, 2, 0)},
        auxiliaries={"aux": result([0.2] * 4, shifts={"sketch": Scores(5, 0.4, 0.4, 1, 0)})},
    )
    assert RobustnessResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert pickle.loads(pickle.dumps(found)) == found
    assert found.to_dict()["ra"] == found.ra
    for wrong in ({}, {"clean": {}}, [], None, 5):
        with pytest.raises(ConfigurationError, match="to_dict"):
            RobustnessResult.from_dict(wrong)


def test_markdown_shows_names_as_they_are():
    name = "a|b\n<i>*c*[d](e)"
    shown = r"a\|b \<i\>\*c\*\[d\]\(e\)"
    found = result([0.5] * 4, shifts={name: Scores(5, 0.2, 0.2, 1, 0)}, adversarial={name: Scores(5, 0.2, 0.2, 1, 0)})
    text = replace(found, auxiliaries={name: found}).to_markdown()
    assert f"| SA on {shown} | 20.00 | 20.00 |" in text
    assert f"| under {shown} | 20.00 | 20.00 |" in text
    assert f"| domain | main | {shown} |" in text
    compared = compare({name: found, f"{name}2": found}).to_markdown()
    assert f"| {shown}2 |" in compared
    assert f"| minus {shown} |" in compared
    assert name not in text + compared


def test_markdown_holds_every_number():
    found = result([0.7, 0.5, 0.6, 0.2], shifts={"sketch": Scores(5, 0.25, 0.2, 1, 0)})
    lines = replace(found, clean=replace(found.clean, mean_class_accuracy=0.7)).to_markdown().splitlines()
    assert {"| SA | 80.00 |", "| RA | 50.00 |", "| SA on sketch | 25.00 |", "| Mean class accuracy | 70.00 |"} < {
        *lines
    }
    assert {"| Calibration error | 5.00 |", "| fog | 70.00 | 50.00 | 60.00 |", "| mean | 65.00 | 35.00 | 50.00 |"} < {
        *lines
    }


def test_mce_is_relative_to_a_baseline():
    ours, baseline = result([0.7, 0.5, 0.6, 0.2]), result([0.6, 0.2, 0.5, 0.1])
    fog, snow = (0.3 + 0.5) / (0.4 + 0.8), (0.4 + 0.8) / (0.5 + 0.9)
    assert ours.mce(baseline) == pytest.approx((fog + snow) / 2)
    assert ours.mce(ours) == pytest.approx(1)
    with pytest.raises(ConfigurationError, match="same protocol"):
        ours.mce(result([0.5] * 2, conditions=[("fog", 1), ("fog", 2)]))
    for wrong in (None, 0.5, {"a": baseline}):
        with pytest.raises(ConfigurationError, match="result of a baseline, found"):
            ours.mce(wrong)
    with pytest.raises(ConfigurationError, match="'fog'"):
        ours.mce(result([1.0, 1.0, 0.5, 0.5]))


def test_t_quantiles_equal_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 4, 5, 6, 9, 10, 29, 100):
        assert t_critical(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-8), degrees


def test_comparison_pairs_seeds():
    stats = pytest.importorskip("scipy.stats")
    base, other = [0.40, 0.50, 0.60], [0.45, 0.54, 0.66]
    found = compare({"vanilla": [result([a] * 4) for a in base], "EntProp": [result([a] * 4) for a in other]})
    differences = [b - a for a, b in zip(base, other, strict=True)]
    paired = stats.ttest_rel(other, base).confidence_interval(0.95)
    change = found.differences["EntProp"]["RA"]
    assert change.mean == pytest.approx(sum(differences) / 3)
    assert (change.mean - change.half_width, change.mean + change.half_width) == pytest.approx(tuple(paired))
    spread = found.scores["vanilla"]["RA"]
    alone = stats.ttest_1samp(base, 0).confidence_interval(0.95)
    assert (spread.mean - spread.half_width, spread.mean + spread.half_width) == pytest.approx(tuple(alone))
    text = found.to_markdown()
    assert f"+5.00 ± {100 * change.half_width:.2f}" in text
    assert "not comparable with a full RA" in text
    json.dumps(found.to_dict())


def test_comparison_of_one_seed_claims_no_interval():
    found = compare({"a": [result([0.5] * 4)], "b": [result([0.6] * 4)]})
    assert found.differences["b"]["RA"] == Estimate(pytest.approx(0.1), None)
    assert "±" not in found.to_markdown()
    assert "Scores are in percent. One seed: " in found.to_markdown()
    assert found == compare({"a": result([0.5] * 4), "b": result([0.6] * 4)})  # as evaluate_robustness returns them
    assert found == compare({"a": result([0.5] * 4), "b": (result([0.6] * 4),)})


def test_comparison_refuses_what_cannot_be_compared():
    with pytest.raises(ConfigurationError, match="same number of results, one per seed"):
        compare({"a": [result([0.5] * 4)], "b": []})
    with pytest.raises(ConfigurationError, match="same number of results, one per seed"):
        compare({})
    with pytest.raises(ConfigurationError, match="one protocol"):
        compare({"a": [result([0.5] * 4)], "b": [result([0.5] * 4, seed=1)]})
    for wrong, message in (
        ({"a": [1]}, r"evaluate_robustness\(\) for 'a', found list"),
        ({"a": 1}, "for 'a', found int"),
        ({"a": "text"}, "for 'a', found str"),
        ([result([0.5] * 4)], "results must be a dict of results by name, found list"),
        (None, "found none"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            compare(wrong)
