"""Everything a run needs to go on exactly where it stood: what goes into a checkpoint, and back out of it."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from entprop_wrap.errors import CheckpointError, DivergedError
from entprop_wrap.state_dicts import auxiliary_state_dict, load_auxiliary_state_dict, main_state_dict
from entprop_wrap.trainer.checkpoint import read_state
from entprop_wrap.trainer.export import save_weights
from entprop_wrap.trainer.launch import Prepared
from entprop_wrap.trainer.meters import Meter

__all__ = ["Position", "RunState"]


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: Optimizer steps taken.
        epoch: Epochs completed.
        batch: Batches of the current epoch that are done, per process.
        evaluation: The metrics of the evaluation at this step, if there was one.
        best: The best value so far of each metric that a best checkpoint was kept by.
        grown: SHA-256 of the images that each phase of growth has made.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    evaluation: dict[str, float] | None = None
    best: dict[str, float] = field(default_factory=dict)
    grown: list[str] = field(default_factory=list)


@dataclass
class RunState:
    """All that changes while training.

    Attributes:
        accelerator: Whose processes train.
        model: The model, outside its containers.
        prepared: The model in its containers, and the optimizer.
        schedule: Of the learning rate.
        average: Moving average of the model, or None.
        generator: Of the step's draws.
        meter: Of the metrics since the last log line.
        position: Where the run stands.
        identity: What makes it this run; see :func:`~entprop_wrap.trainer.run_identity.check_same_run`.
        total_steps: Steps of the whole run.
        learning_rate: Of the first parameter group, in the last step.
    """

    accelerator: Accelerator
    model: nn.Module
    prepared: Prepared
    schedule: LRScheduler
    average: AveragedModel | None
    generator: torch.Generator
    meter: Meter
    position: Position
    identity: dict[str, Any]
    total_steps: int
    learning_rate: float = 0.0

    def save(self, folder: Path) -> None:
        """Write this process's part of a checkpoint; the main process writes what all share."""
        own = {"random": _random_states(self.generator, self.accelerator.device), "meter": self.meter.state_dict()}
        torch.save(own, folder / f"process-{self.accelerator.process_index:05d}.pt")
        if not self.accelerator.is_main_process:
            return
        _save_model(self.model, folder, "model", "auxiliary")
        if self.average is not None:
            _save_model(self.average.module, folder, "ema", "ema_auxiliary")
        scaler = self.accelerator.scaler
        shared = {
            "optimizer": self.prepared.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "averaged": None if self.average is None else int(self.average.n_averaged),
        }
        torch.save(shared, folder / "optimizer.pt")
        state = {**asdict(self.position), "run": self.identity}
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go back to where the checkpoint in ``folder`` was written.

        Raises:
            CheckpointError: Files are missing, damaged, or do not fit.
        """
        device = self.accelerator.device
        state = {"grown": [], **read_state(folder)}  # checkpoints of before data could grow do not have it
        shared = _read(folder / "optimizer.pt", _read_pickle)
        own = _read(folder / f"process-{self.accelerator.process_index:05d}.pt", _read_pickle)
        _load_model(self.model, folder, "model", "auxiliary")
        if self.average is not None:
            _load_model(self.average.module, folder, "ema", "ema_auxiliary")
            self.average.n_averaged.fill_(shared["averaged"])
        try:
            self.prepared.optimizer.load_state_dict(shared["optimizer"])
            self.schedule.load_state_dict(shared["schedule"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"The optimizer in {folder} does not fit the one given ({error}).") from error
        if self.accelerator.scaler is not None and shared["scaler"]:
            self.accelerator.scaler.load_state_dict(shared["scaler"])
        self.meter.load_state_dict(own["meter"], device)
        self.position = Position(**{entry.name: state[entry.name] for entry in fields(Position)})
        _set_random_states(own["random"], self.generator, device)


def _save_model(model: nn.Module, folder: Path, main: str, copies: str) -> None:
    weights, auxiliary = main_state_dict(model), auxiliary_state_dict(model)
    everything = {**weights, **auxiliary}
    if broken := [key for key, value in everything.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise DivergedError(
            f"Did not save: {len(broken)} of {len(everything)} weights are not finite, such as {broken[0]!r}. Training "
            "has diverged; earlier checkpoints are as they were. Try a smaller learning rate or a max_grad_norm."
        )
    save_weights(weights, folder / f"{main}.safetensors")
    if auxiliary:
        save_weights(auxiliary, folder / f"{copies}.safetensors")


def _load_model(model: nn.Module, folder: Path, main: str, copies: str) -> None:
    weights = _read(folder / f"{main}.safetensors", load_file)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {error}") from error
    if auxiliary_state_dict(model):
        load_auxiliary_state_dict(model, _read(folder / f"{copies}.safetensors", load_file))


def _read_pickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read(path: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(path)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: the checkpoint is incomplete or damaged ({error}).") from error
    except Exception as error:  # safetensors has an error class of its own
        raise CheckpointError(f"{path} is damaged ({error}).") from error


def _random_states(generator: torch.Generator, device: torch.device) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "step": generator.get_state(),
    }


def _set_random_states(states: dict[str, Any], generator: torch.Generator, device: torch.device) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    cuda: Tensor | None = states["cuda"]
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)
    generator.set_state(states["step"])
