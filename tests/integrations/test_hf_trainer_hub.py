"""Uploads of the Trainer with the callback: plain weights, and the copies of the same step in their own file."""

import fnmatch
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file
from transformers import Trainer

from entprop_wrap import EntProp, auxiliary_state_dict
from tests.integrations.hf_trainer_reference import (
    assert_plain,
    assert_same,
    best_of,
    callback,
    keys_in,
    make_trainer,
)

FILE = "entprop_auxiliary.safetensors"
OPTIONS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "optim": "adamw_torch"}


class Hub:
    """Stands where transformers calls the network, and keeps in a folder what the Hub would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pushes, self.finished = folder, [], True

    def create_repo(self, name, **options):
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, folder_path, path_in_repo="", ignore_patterns=(), run_as_future=False, **options):
        source, target = Path(folder_path), self.folder / path_in_repo
        for file in source.rglob("*"):
            name = file.relative_to(source).as_posix()
            if file.is_file() and not any(fnmatch.fnmatch(name, p) for p in ignore_patterns or ()):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)
        self.pushes.append((path_in_repo, keys_in(target / "model.safetensors")))
        result = Future()
        if self.finished:
            result.set_result(None)
        return result if run_as_future else None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = Hub(tmp_path / "remote")
    for name, value in (
        ("hf_api", lambda: fake),
        ("create_repo", fake.create_repo),
        ("upload_folder", fake.upload_folder),
    ):
        if hasattr(transformers.trainer, name):
            monkeypatch.setattr(transformers.trainer, name, value)
    monkeypatch.setattr(Trainer, "create_model_card", lambda *a, **k: None)
    return fake


def make(folder, name="ResNet", **options):
    pushing = {"push_to_hub": True, "hub_model_id": "someone/something", "hub_token": "none"}
    added = callback(EntProp(fraction=0.5))
    return make_trainer(folder, model=name, callbacks=[added], **{**OPTIONS, **pushing, **options})


def assert_copies_of(trainer, file):
    assert_same(load_file(file), auxiliary_state_dict(trainer.model))


STRATEGIES = {
    "end": set(),
    "every_save": set(),
    "checkpoint": {"last-checkpoint"},
    "all_checkpoints": {"checkpoint-1", "checkpoint-2"},
}


@pytest.mark.parametrize(("strategy", "name"), [*((one, "ResNet") for one in STRATEGIES), ("checkpoint", "ViT")])
def test_what_is_pushed_is_plain(strategy, name, hub, tmp_path):
    trainer = make(tmp_path / "run", name, hub_strategy=strategy, hub_always_push=True)
    trainer.train()
    pushed = {path for path, _ in hub.pushes}
    assert pushed - {""} == STRATEGIES[strategy]
    trainer.push_to_hub()
    assert not [key for _, found in hub.pushes for key in found if "entprop" in key]
    for folder in ("", *STRATEGIES[strategy]):
        assert_plain(hub.folder / folder)
    assert_copies_of(trainer, hub.folder / FILE)
    for folder in STRATEGIES[strategy] - {"checkpoint-1"}:
        assert_copies_of(trainer, hub.folder / folder / FILE)
        again = make(tmp_path / "again", name, hub_strategy=strategy, push_to_hub=False, max_steps=3)
        again.train(resume_from_checkpoint=str(hub.folder / folder))
        assert again.state.global_step == 3


def test_copies_on_the_hub_are_those_of_its_weights(hub, tmp_path):
    trainer = make(tmp_path / "run", hub_strategy="every_save", hub_always_push=True)
    trainer.train()
    trainer.save_model()  # writes both files in the Trainer's folder
    trainer.args.max_steps = 1
    trainer.train()
    assert_copies_of(trainer, hub.folder / FILE)
    assert_plain(hub.folder)


def test_a_push_that_is_skipped_moves_nothing(hub, tmp_path):
    run = tmp_path / "run"
    trainer = make(run, hub_strategy="every_save")
    trainer._finish_current_push = lambda: None
    hub.finished = False
    trainer.train()
    assert len(hub.pushes) == 1  # at the first step; it has not ended since
    for name in (FILE, "model.safetensors"):
        first = (run / "checkpoint-1" / name).read_bytes()
        assert (run / name).read_bytes() == first == (hub.folder / name).read_bytes()


def test_weights_alone_are_saved_pushed_and_continued_from(hub, tmp_path):
    options = {"hub_strategy": "checkpoint", "hub_always_push": True, "save_only_model": True}
    trainer = make(tmp_path / "a", **options, **best_of([1.0, 2.0]))
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    checkpoint = tmp_path / "a" / "checkpoint-1"
    assert not (checkpoint / "optimizer.pt").exists()
    assert_copies_of(trainer, checkpoint / FILE)
    assert_plain(hub.folder / "last-checkpoint")
    again = make(tmp_path / "b", **{**options, "push_to_hub": False, "max_steps": 3})
    again._load_from_checkpoint(str(checkpoint))
    torch.testing.assert_close(again.model.state_dict(), trainer.model.state_dict(), rtol=0, atol=0)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 3
