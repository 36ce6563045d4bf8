"""Folders that cannot be written to, disks that are full, and a second run in a folder."""

import os
import resource

import pytest

from entprop_wrap.errors import CheckpointError, ConfigurationError
from entprop_wrap.utils import files
from tests.faults import accidents
from tests.trainer import programs

pytestmark = pytest.mark.filterwarnings("ignore:Only . images a step")  # batches are small here


def test_a_folder_that_cannot_be_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/run", tmp_path / ("a" * 300), "/proc/run", "a\0b"):
        with pytest.raises(ConfigurationError, match=r"output_dir=.*cannot be written to"):
            programs.short(folder)
    programs.short(tmp_path / "new/run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("limit", [100, 2000, 5000])
def test_a_full_disk_leaves_what_was_saved(tmp_path, limit):
    """The limit on the size of a file stands for the end of the disk: writing fails in the same place."""
    trainer = programs.short(tmp_path, "adamw")
    save, before = trainer.checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(state):
        if state.position.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return save(state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    trainer.checkpoints.save = full
    with pytest.raises(CheckpointError, match=r"step-00000004 cannot be written .* GB are free there"):
        trainer.fit()
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000002"]
    programs.short(tmp_path, "adamw").fit(resume=True)


@pytest.mark.parametrize("line", [2, 4], ids=["train", "eval"])
def test_a_full_disk_stops_the_metrics_with_a_word(tmp_path, line):
    trainer = programs.short(tmp_path)
    write, before = trainer._metrics.write, resource.getrlimit(resource.RLIMIT_FSIZE)
    left = [line]

    def full(content):
        left[0] -= 1
        if left[0] == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (trainer._metrics.path.stat().st_size + 9, before[1]))
        try:
            return write(content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    trainer._metrics.write = full
    with pytest.raises(CheckpointError, match=r"metrics.jsonl cannot be written .* GB are free there"):
        trainer.fit()
    assert trainer._metrics.path.read_text().endswith('\n{"kind": ')  # cut off, and dropped on resuming
    programs.short(tmp_path).fit(resume=True)
    programs.short(tmp_path / "whole").fit()
    assert accidents.differences(tmp_path / "whole", tmp_path) == []


def test_a_second_run_in_a_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    trainer = programs.short(tmp_path)
    evaluate, refused = trainer.evaluate, []

    def starting_another():
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CheckpointError, match="Another run is at work"):
            programs.short(tmp_path).fit(resume=True)
        refused.append(sorted(tmp_path.rglob("*")) == before)
        return evaluate()

    trainer.evaluate = starting_another
    trainer.fit()
    assert refused == [True, True, True]
    programs.short(tmp_path).fit(resume=True)
