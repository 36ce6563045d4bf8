"""Runs killed at random moments end as if they had not been."""

import random

import pytest

from tests.faults import accidents

pytestmark = pytest.mark.filterwarnings("ignore:Only . images a step")  # batches are small here


def test_kills_at_random_moments(tmp_path):
    counts = accidents.storm(tmp_path / "killed", 3, random.Random(0))
    print(f"\nKills: {dict(counts)}")
    accidents.train(tmp_path / "whole", 3)
    assert accidents.differences(tmp_path / "whole", tmp_path / "killed") == []
