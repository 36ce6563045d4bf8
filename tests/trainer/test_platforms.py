"""What other machines refuse, refused here as they do: Windows' files, MPS's numbers, processes without a GPU."""

import errno
import fcntl
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from entprop_wrap.errors import ConfigurationError, UnsupportedModelError
from tests.trainer import programs

pytestmark = pytest.mark.filterwarnings("ignore:Only . images a step")  # batches are small here


class NoDoubles(TorchDispatchMode):
    """Refuses float64, as MPS does; only what lies in a CPU's memory may be read as numbers of double precision."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in tree_leaves(result)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it.")
        return result


def test_a_run_without_double_precision(tmp_path, monkeypatch):
    trainer = programs.short(tmp_path, ema_decay=0.5)
    # The one place for them, behind a copy to the CPU.
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: torch.tensor(tensor.tolist()))
    trainer.pixel_space.scale(torch.zeros(1, 3, 1, 1))  # constants are made on the CPU, and then single
    with NoDoubles():
        found = trainer.fit()
        with pytest.raises(TypeError, match="MPS"):
            torch.zeros(2, dtype=torch.float64)
    monkeypatch.undo()
    assert trainer.evaluate() == pytest.approx(found)


def test_windows_flushes_only_what_may_be_written(tmp_path, monkeypatch):
    fsync, open_file = os.fsync, os.open

    def refusing_fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    def refusing_open(path, flags, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, flags, *args, **options)

    monkeypatch.setattr(os, "fsync", refusing_fsync)
    monkeypatch.setattr(os, "open", refusing_open)
    programs.short(tmp_path).fit()
    assert len(list(tmp_path.glob("checkpoints/step-*"))) > 1


def test_files_and_folders_reach_the_disk_before_their_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename

    def noting_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noting_rename(source, target):
        events.append(f"-> {os.path.basename(target)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    programs.short(tmp_path, evaluate_every=3).fit()
    first = events[: events.index("-> step-00000002") + 2]
    files = {"model.safetensors", "auxiliary.safetensors", "optimizer.pt", "process-00000.pt", "state.json"}
    assert files < set(first[:-3])
    assert first[-3:] == ["step-00000002.partial", "-> step-00000002", "checkpoints"]


def test_processes_that_do_not_know_of_one_another(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match=r"2 processes were started.*ACCELERATE_USE_CPU=true"):
        programs.short(tmp_path)
    assert not list(tmp_path.iterdir())


def test_optimizers_that_want_more_of_a_loop(tmp_path):
    class ScheduleFree(torch.optim.SGD):
        def eval(self):
            pass

    with pytest.raises(UnsupportedModelError, match="LBFGS steps with a closure"):
        programs.short(tmp_path, lambda groups: torch.optim.LBFGS(groups[0]["params"]))
    with pytest.raises(UnsupportedModelError, match="ScheduleFree has weights for training and others for evaluation"):
        programs.short(tmp_path, ScheduleFree)


def test_optimizers_that_step_within_backward(tmp_path):
    def layerwise(groups):
        for group in groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(lambda parameter: None)
        return torch.optim.SGD(groups, lr=0.1)

    with pytest.raises(UnsupportedModelError, match="GaLore"):
        programs.short(tmp_path, layerwise)
