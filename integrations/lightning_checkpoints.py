"""The copies in Lightning checkpoints, and between two fits."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from entprop_wrap.errors import CheckpointError
from entprop_wrap.methods.lagged import lagged_state
from entprop_wrap.wrapping.state_dict import auxiliary_names, auxiliary_state_dict, load_auxiliary_state_dict

__all__ = ["AUXILIARY_KEY", "LAGGED_KEY", "Copies", "add_waiting", "join", "separate"]

#: Where a Lightning checkpoint holds the auxiliary copies; its ``state_dict`` is the plain module's.
AUXILIARY_KEY = "entprop_auxiliary"
#: Where it holds what waits for the next lagged step of each process.
LAGGED_KEY = "entprop_lagged"


def separate(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Move the copies of ``module`` out of the ``state_dict`` of a checkpoint that is to be written."""
    state, keys = checkpoint["state_dict"], auxiliary_state_dict(module).keys()
    if copies := {key: value for key, value in state.items() if key in keys}:
        checkpoint["state_dict"] = {key: value for key, value in state.items() if key not in copies}
        checkpoint[AUXILIARY_KEY] = copies


def join(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put them back into the ``state_dict`` of a checkpoint that is to be loaded into ``module``, which is wrapped."""
    state, keys = checkpoint["state_dict"], auxiliary_state_dict(module).keys()
    copies = checkpoint.get(AUXILIARY_KEY) or {key: value for key, value in state.items() if key in keys}
    if not copies:
        raise CheckpointError(
            "The checkpoint has no auxiliary copies: it was written without EntPropLightningCallback. Start a new run "
            "from its weights: load_from_checkpoint(path), then fit() without ckpt_path."
        )
    load_auxiliary_state_dict(module, copies)  # for its checks
    checkpoint["state_dict"] = {**state, **copies}


def add_waiting(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Add what waits for the next lagged step of each process."""
    waiting = next((state for part in module.modules() if (state := lagged_state(part))), None)
    if waiting is not None:
        everyone: list[Any] = [{key: value.cpu() for key, value in waiting.items()}]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            mine, everyone = everyone[0], everyone * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, mine)
        checkpoint[LAGGED_KEY] = everyone


class Copies:
    """The copies of a wrapped module, and the tensors that they are copies of, to know it by in a second ``fit``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        state, names = module.state_dict(), auxiliary_names(module)
        self.auxiliary = {key: state[key].cpu().clone() for key in state if key in names}
        self.originals = {names[key]: state[names[key]].cpu().clone() for key in self.auxiliary if names[key] in state}

    def belong_to(self, module: nn.Module) -> bool:
        """Return whether ``module`` is the one they were taken from, with the norm layers it had."""
        state = module.state_dict() if self.module() is module else {}
        return bool(state) and all(
            name in state and torch.equal(state[name].cpu(), value) for name, value in self.originals.items()
        )
