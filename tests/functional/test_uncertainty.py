"""Entropy, counts and top-k at their edges; scores against their definitions are in test_entprop_parity.py."""

import math

import pytest
import torch

from entprop_wrap.functional import uncertainty


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
