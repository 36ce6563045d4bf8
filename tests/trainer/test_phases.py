"""A script that trains, has its data grow, and trains again, as ME-ADA does."""

import pytest

from tests.faults.accidents import differences
from tests.trainer import programs


def test_resumed_it_ends_the_same(tmp_path):
    whole = tmp_path / "whole"
    programs.phased(whole)
    steps = {"first phase": 7, "second phase": 10 + 13}
    for name, step in steps.items():
        with pytest.raises(KeyboardInterrupt):
            programs.phased(tmp_path / name, stop_after=step)
    names = [sorted(path.name for path in (tmp_path / name).glob("phase*/checkpoints/*")) for name in steps]
    assert names == [["step-00000005"], ["step-00000005", "step-00000010", "step-00000010"]]
    for name in steps:
        programs.phased(tmp_path / name, resume=True)
        for phase in ("phase1", "phase2"):
            assert differences(whole / phase, tmp_path / name / phase) == [], f"{name}, {phase}"
