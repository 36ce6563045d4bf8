"""Everything a run needs to continue exactly where it stood: what goes into a checkpoint, and back out of it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from entprop_wrap.errors import CheckpointError, DivergedError
from entprop_wrap.methods.lagged import lagged_state, load_lagged_state
from entprop_wrap.trainer.accelerator import Prepared
from entprop_wrap.trainer.checkpoint import read_state
from entprop_wrap.trainer.data_loader import random_states, set_random_states
from entprop_wrap.trainer.ema import MovingAverage
from entprop_wrap.trainer.export import save_weights
from entprop_wrap.trainer.metrics import Meter
from entprop_wrap.wrapping.state_dict import auxiliary_state_dict, main_state_dict


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: Optimizer steps taken.
        epoch: Epochs completed.
        batch: Batches of the current epoch that are done, per process.
        evaluation: The metrics of the evaluation at this step, if there was one.
        best: The best value so far of each metric that a best checkpoint was kept by.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    evaluation: dict[str, float] | None = None
    best: dict[str, float] = field(default_factory=dict)


@dataclass
class RunState:
    """All that changes while training."""

    accelerator: Accelerator
    model: nn.Module  # outside its containers
    prepared: Prepared
    schedule: LRScheduler
    average: MovingAverage | None
    identity: dict[str, Any]  # what a resumed run must share, see check_same_run
    total_steps: int
    generator: torch.Generator = field(default_factory=torch.Generator)  # of the step's draws
    meter: Meter = field(default_factory=Meter)  # since the last log line
    position: Position = field(default_factory=Position)
    learning_rate: float = 0.0  # of the first parameter group, in the last step

    def write(self, folder: Path) -> None:
        """Write this process's part of a checkpoint; the main process writes what all share."""
        device = self.accelerator.device
        own = {
            **random_states(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "step": self.generator.get_state(),
            "meter": self.meter.state_dict(),
        }
        torch.save(own, self._own(folder, "process", "pt"))
        if waiting := lagged_state(self.model):
            save_weights(waiting, self._own(folder, "lagged", "safetensors"))
        if not self.accelerator.is_main_process:
            return
        for model, names in self._models():
            _write_model(model, folder, *names)
        scaler = self.accelerator.scaler
        shared = {
            "optimizer": self.prepared.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "averaged": None if self.average is None else int(self.average.n_averaged),
        }
        torch.save(to_python(shared), folder / "optimizer.pt")

    def read(self, folder: Path) -> dict[str, Any]:
        """Return what the checkpoint in ``folder`` holds for this process, or raise; nothing changes."""
        state, lagged = read_state(folder), self._own(folder, "lagged", "safetensors")
        return {
            "position": Position(**{entry.name: state[entry.name] for entry in fields(Position)}),
            "shared": _read(folder / "optimizer.pt"),
            "own": _read(self._own(folder, "process", "pt")),
            "lagged": _read(lagged) if lagged.name in state["files"] else {},
            "weights": [_read_model(model, folder, *names) for model, names in self._models()],
        }

    def apply(self, read: dict[str, Any]) -> None:
        """Go back to where a checkpoint was written, or raise before the model changes."""
        device, shared, own = self.accelerator.device, read["shared"], read["own"]
        self.prepared.optimizer.load_state_dict(shared["optimizer"])
        self.schedule.load_state_dict(shared["schedule"])
        if self.accelerator.scaler is not None and shared["scaler"]:
            self.accelerator.scaler.load_state_dict(shared["scaler"])
        for (model, _), weights in zip(self._models(), read["weights"], strict=True):
            model.load_state_dict(weights)
        if self.average is not None:
            self.average.n_averaged.fill_(shared["averaged"])
        lagged = read["lagged"]
        if lagged and self.identity["channels_last"]:  # which the file does not keep
            lagged = {**lagged, "images": lagged["images"].contiguous(memory_format=torch.channels_last)}
        load_lagged_state(self.model, lagged)
        self.meter.load_state_dict(own["meter"], device)
        self.position = read["position"]
        set_random_states(own)
        if own["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], device)
        self.generator.set_state(own["step"])

    def _own(self, folder: Path, name: str, suffix: str) -> Path:
        return folder / f"{name}-{self.accelerator.process_index:05d}.{suffix}"

    def _models(self) -> list[tuple[nn.Module, tuple[str, str]]]:
        average = [] if self.average is None else [(self.average.module, ("ema", "ema_auxiliary"))]
        return [(self.model, ("model", "auxiliary")), *average]


def to_python(value: Any) -> Any:
    """Return ``value`` with Python's numbers for NumPy's, in dicts, lists and tuples: checkpoints hold no others."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        kind = type(value) if isinstance(value, (Counter, OrderedDict)) else dict
        return kind({to_python(key): to_python(item) for key, item in value.items()})
    return type(value)(map(to_python, value)) if type(value) in (list, tuple) else value


def _write_model(model: nn.Module, folder: Path, main: str, copies: str) -> None:
    weights, auxiliary = main_state_dict(model), auxiliary_state_dict(model)
    everything = {**weights, **auxiliary}
    statistics = ("running_mean", "running_var")
    masks = {key for key, _ in model.named_buffers() if not key.endswith(statistics)}  # which may hold -inf
    bad = {key: value.isnan() if key in masks else ~value.isfinite() for key, value in everything.items()}
    if broken := [key for key, found in bad.items() if found.any()]:
        raise DivergedError(
            f"Did not save: {len(broken)} of {len(everything)} weights are not finite, such as {broken[0]!r}. Training "
            "has diverged; earlier checkpoints are as they were. Try a smaller learning rate or a max_grad_norm."
        )
    save_weights(weights, folder / f"{main}.safetensors")
    if auxiliary:
        save_weights(auxiliary, folder / f"{copies}.safetensors")


def _read_model(model: nn.Module, folder: Path, main: str, copies: str) -> dict[str, Tensor]:
    weights = _read(folder / f"{main}.safetensors")
    if auxiliary_state_dict(model):
        weights |= _read(folder / f"{copies}.safetensors")
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if differing := [key for key in {**expected, **found} if expected.get(key) != found.get(key)]:
        key = differing[0]
        raise CheckpointError(
            f"{folder} does not fit {type(model).__name__}: {len(differing)} weights differ, such as {key!r}: "
            f"{found.get(key)} there, {expected.get(key)} here."
        )
    return dict(weights)


def _read(path: Path) -> Any:
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each have their own
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].split(". Please")[0]
        raise CheckpointError(
            f"{path} cannot be read ({reason}). A checkpoint can hold tensors, numbers, text, and lists and dicts of "
            "these; if optimizer and schedule keep nothing else, the file is incomplete or damaged."
        ) from error
