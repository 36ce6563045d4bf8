"""A script that trains, has its data grow, and trains again, as ME-ADA does."""

import pytest
import torch
from safetensors.torch import load_file

from entprop_wrap.methods import grow
from tests.helpers.launch import python, torchrun
from tests.helpers.trainer_toys import BatchNormNet, Images, make
from tests.trainer import programs
from tests.trainer.test_resume import contents, equal, lines


def test_resumed_in_a_new_process_it_ends_the_same(tmp_path):
    whole = tmp_path / "whole"
    programs.phased(whole)
    steps = {"first phase": 7, "second phase": 10 + 13}
    for name, step in steps.items():
        with pytest.raises(KeyboardInterrupt):
            programs.phased(tmp_path / name, stop_after=step)
    names = [sorted(path.name for path in (tmp_path / name).glob("phase*/checkpoints/*")) for name in steps]
    assert names == [["step-00000005"], ["step-00000005", "step-00000010", "step-00000010"]]
    python("tests.trainer.programs", "resume_phased", *(tmp_path / name for name in steps))
    for name in steps:
        for phase, last in ((1, 10), (2, 20)):
            first, second = (folder / f"phase{phase}" for folder in (whole, tmp_path / name))
            checkpoint = f"checkpoints/step-{last:08d}"
            assert equal(contents(first / checkpoint), contents(second / checkpoint)), f"{name}, phase {phase}"
            assert lines(first) == lines(second)
            model = "model/model.safetensors"
            assert equal(load_file(first / model), load_file(second / model))


def test_two_processes_make_a_share_each(tmp_path):
    torchrun(tmp_path / "logs", "tests.trainer.programs", "grow_together", tmp_path)
    found = [torch.load(tmp_path / f"grown-{rank}.pt") for rank in (0, 1)]
    assert equal(*found)
    model = make(BatchNormNet)
    model.load_state_dict(found[0]["model"])
    alone = grow(model, Images(20), ascent=programs.ASCENT, batch_size=3, progress=False)
    assert torch.equal(alone.datasets[1].images, found[0]["images"])
