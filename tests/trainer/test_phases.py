"""A script that trains, has its data grow, and trains again, as ME-ADA does."""

import pytest
from safetensors.torch import load_file

from tests.trainer import programs
from tests.trainer.test_resume import contents, equal, lines


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
        for phase, last in ((1, 10), (2, 20)):
            first, second = (folder / f"phase{phase}" for folder in (whole, tmp_path / name))
            checkpoint = f"checkpoints/step-{last:08d}"
            assert equal(contents(first / checkpoint), contents(second / checkpoint)), f"{name}, phase {phase}"
            assert lines(first) == lines(second)
            model = "model/model.safetensors"
            assert equal(load_file(first / model), load_file(second / model))
