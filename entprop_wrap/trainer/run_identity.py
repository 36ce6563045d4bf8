"""The settings that must not change between a checkpoint and the run that resumes from it."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from entprop_wrap.errors import CheckpointError
from entprop_wrap.trainer.config import TrainerConfig


def describe(value: Any) -> str:
    """Return a description that is the same in every process: qualified names, and no addresses."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def describe_loss(loss: Any) -> str:
    """Return a description with the options of a module, such as label smoothing, which its ``repr`` may leave out."""
    if not isinstance(loss, nn.Module):
        return describe(loss)
    options = {name: value for name, value in vars(loss).items() if not name.startswith("_")}
    state = describe(dict(loss.state_dict()))  # long, where a teacher is in it
    return f"{describe(loss)} {describe(options)} {hashlib.sha256(state.encode()).hexdigest()[:16]}"


def identity(
    config: TrainerConfig,
    model: nn.Module,
    optimizer: Optimizer,
    loss: Any,
    accelerator: Accelerator,
    total_steps: int,
    **more: Any,
) -> dict[str, Any]:
    """Return what a resumed run must share with the run it continues, as JSON; all other options may change.

    ``optimizer`` has its schedule, which notes initial learning rates; ``more`` are numbers, or objects to describe.
    """
    options = ("gradient_accumulation_steps", "max_grad_norm", "ema_decay", "seed", "channels_last")
    noted = ("initial_lr", "momentum", "weight_decay", "betas", "eps", "alpha", "dampening", "nesterov")
    groups = [
        {"parameters": len(group["params"]), **{key: group[key] for key in noted if key in group}}
        for group in optimizer.param_groups
    ]
    return {
        "model": type(model).__name__,
        "modules": hashlib.sha256(describe(model).encode()).hexdigest()[:16],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "optimizer": type(optimizer).__name__,
        "loss": describe_loss(loss),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "groups": json.loads(json.dumps(groups, default=float)),  # as state.json has it
        "schedule": describe(config.schedule),
        "warmup": config.warmup,
        # A constant rate does not know how long the run is, which may then be made longer.
        "steps": None if config.schedule == "constant" and config.warmup == 0 else total_steps,
        **{name: getattr(config, name) for name in options},
        **{key: value if isinstance(value, (int, str, dict)) else describe(value) for key, value in more.items()},
    }


def check_same_run(checkpoint: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError`, listing all differences, unless both runs mean the same."""
    differences = [
        f"{key}: {saved.get(key)!r} there, {current.get(key)!r} here"
        for key in {**saved, **current}
        if not (alike if key == "data" else operator.eq)(saved.get(key), current.get(key))
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint} belongs to another run ({'; '.join(differences)}). Resume with the same options, or load "
            "its model.safetensors into the model and start in a new output_dir."
        )


def alike(first: Any, second: Any) -> bool:
    """Return whether two fingerprints of data are equal, up to what is random and what image decoders differ in."""
    if "random" in (first, second):
        return True
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(alike(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(alike, first, second))
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-3, abs_tol=1e-3)
    return bool(first == second)
