"""Scores against their definitions, sample by sample; counts and top-k at their edges."""

import math

import pytest
import torch

from entprop_wrap.functional import uncertainty

LOGITS = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
LABELS = torch.randint(5, (9,), generator=torch.Generator().manual_seed(1))


def by_definition(name, logits, label):
    total = sum(math.exp(v) for v in logits)
    p = [math.exp(v) / total for v in logits]
    return {
        "entropy": -sum(v * math.log(v) for v in p),
        "least_confidence": 1 - max(p),
        "logit_margin": max(v for i, v in enumerate(p) if i != label) - p[label],
        "cross_entropy": -math.log(p[label]),
    }[name]


@pytest.mark.parametrize("name", ["entropy", "least_confidence", "logit_margin", "cross_entropy"])
@pytest.mark.parametrize("soft", [False, True])
def test_scores_are_their_definitions(name, soft):
    labels = torch.nn.functional.one_hot(LABELS, 5).double() if soft else LABELS
    expected = [by_definition(name, row.tolist(), int(label)) for row, label in zip(LOGITS, LABELS, strict=True)]
    assert getattr(uncertainty, name)(LOGITS, labels).tolist() == pytest.approx(expected, abs=1e-12)


def test_entropy_of_certainty_and_of_ignorance():
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 0.0, 0.0], [-math.inf, 0.0, 0.0]])
    assert uncertainty.entropy(logits).tolist() == pytest.approx([0, math.log(3), math.log(2)])
    assert uncertainty.entropy(logits.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("batch", "fraction", "expected"),
    [(64, 0.2, 13), (10, 0.25, 3), (7, 0.4, 3), (3, 0.01, 2), (2, 1.0, 2), (5, 1.0, 5)],
)
def test_counts_round_half_up_and_are_at_least_two(batch, fraction, expected):
    assert uncertainty.num_selected(batch, fraction) == expected


def test_top_gives_the_highest_first():
    assert uncertainty.top_k(torch.tensor([0.1, 0.9, 0.5, 0.7]), 3).tolist() == [1, 3, 2]
