"""Checkpoints that were not written to their end: told from complete ones, refused, and passed over."""

import gc
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from entprop_wrap import EntProp
from entprop_wrap.errors import CheckpointError
from entprop_wrap.integrations.hf_trainer import last_complete_checkpoint
from tests.helpers.processes import context
from tests.integrations.hf_trainer_reference import (
    callback,
    make_trainer,
)

FILE = "entprop_auxiliary.safetensors"
STEPS = 4


def make(folder, **options):
    saving = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1, "max_steps": STEPS}
    added = callback(EntProp(fraction=0.5))
    return make_trainer(folder, model="ResNet", callbacks=[added], **{**saving, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: its folder and its last state."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make(folder)
    trainer.train()
    return folder, trainer.model.state_dict()


def copy_of(finished, tmp_path):
    for step in (1, 2):
        shutil.copytree(finished[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path / "checkpoint-2"


FILES = [
    "trainer_state.json",
    "model.safetensors",
    FILE,
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "config.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_off_is_seen(name, finished, tmp_path):
    checkpoint = copy_of(finished, tmp_path)
    assert last_complete_checkpoint(tmp_path) == str(checkpoint)
    file = checkpoint / name
    whole = file.read_bytes()
    for size in (0, len(whole) // 2, len(whole) - 2):
        file.write_bytes(whole[:size])
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    trainer = make(tmp_path / "again")
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"checkpoint-2 is not complete: '{name}'.*from .*checkpoint-1"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


def test_a_run_that_was_killed_between_two_files_is_seen(finished, tmp_path):
    """The state of a run is written last, so a folder without it is not complete."""
    checkpoint = copy_of(finished, tmp_path)
    for name in sorted(os.listdir(checkpoint), key=lambda name: os.stat(checkpoint / name).st_mtime_ns, reverse=True):
        (checkpoint / name).unlink()
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    checkpoint.rmdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_bits_that_changed_in_what_torch_saved_are_seen(finished, tmp_path):
    file = copy_of(finished, tmp_path) / "optimizer.pt"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_where_there_is_nothing(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None
    (tmp_path / "checkpoint-final").mkdir()
    assert last_complete_checkpoint(str(tmp_path)) is None


def test_the_copies_are_replaced_at_once(finished, tmp_path, monkeypatch):
    trainer = make(tmp_path)
    trainer.save_model()
    before = (tmp_path / FILE).read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        trainer.save_model()
    assert (tmp_path / FILE).read_bytes() == before


def run(folder):
    torch.set_num_threads(1)
    gc.freeze()  # as in tests/conftest.py
    make(folder).train()


def test_runs_that_are_killed_resume_bit_for_bit(finished, tmp_path):
    moments = random.Random(1)
    for number in range(2):
        folder = tmp_path / str(number)
        process = context().Process(target=run, args=(folder,))
        process.start()
        last = folder / f"checkpoint-{moments.randint(2, STEPS)}"
        deadline = time.monotonic() + 240
        while not last.exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
        checkpoint = last_complete_checkpoint(folder)
        assert checkpoint is not None
        assert Path(checkpoint).name in (last.name, f"checkpoint-{int(last.name.split('-')[1]) - 1}")
        again = make(tmp_path / f"{number} resumed", save_strategy="no")
        again.train(resume_from_checkpoint=checkpoint)
        state = again.model.state_dict()
        assert [key for key, value in finished[1].items() if not torch.equal(value, state[key])] == []
