"""The auxiliary copies in Lightning's checkpoints, beside the plain module's state, and between two runs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.errors import CheckpointError
from entprop_wrap.state_dicts import (
    auxiliary_state_dict,
    is_auxiliary_key,
    load_auxiliary_state_dict,
    main_state_dict,
    original_name,
)

__all__ = ["AUXILIARY_KEY", "Copies", "join", "separate"]

#: Where a Lightning checkpoint holds the auxiliary copies; its ``state_dict`` is the plain module's.
AUXILIARY_KEY = "entprop_auxiliary"


def separate(checkpoint: dict[str, Any]) -> None:
    """Move the copies out of the ``state_dict`` of a checkpoint that is to be written."""
    state = checkpoint["state_dict"]
    if copies := {key: value for key, value in state.items() if is_auxiliary_key(key)}:
        checkpoint["state_dict"] = {key: value for key, value in state.items() if key not in copies}
        checkpoint[AUXILIARY_KEY] = copies


def join(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put them back into the ``state_dict`` of a checkpoint that is to be loaded into ``module``, which is wrapped.

    Raises:
        CheckpointError: There are none, or those of a model that was wrapped differently.
    """
    state = checkpoint["state_dict"]
    copies = checkpoint.get(AUXILIARY_KEY, {key: value for key, value in state.items() if is_auxiliary_key(key)})
    if not copies:
        raise CheckpointError(
            "The checkpoint has no auxiliary copies: it was written without EntPropLightningCallback, so its optimizer "
            "does not know them. Start a new run from its weights: load_from_checkpoint(path), then fit() without "
            "ckpt_path."
        )
    load_auxiliary_state_dict(module, copies)  # for its checks
    checkpoint["state_dict"] = {**state, **copies}


@dataclass
class Copies:
    """The copies of a module that was unwrapped.

    Attributes:
        module: Whose they are.
        auxiliary: Their part of the state dict.
        norms: What they are copies of, as it was then.
    """

    module: weakref.ReferenceType[nn.Module]
    auxiliary: dict[str, Tensor]
    norms: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> Copies:
        """Keep the copies of a module that is about to be unwrapped."""
        auxiliary = {key: value.cpu().clone() for key, value in auxiliary_state_dict(module).items()}
        names = {original_name(key) for key in auxiliary}
        norms = {key: value.cpu().clone() for key, value in main_state_dict(module).items() if key in names}
        return cls(weakref.ref(module), auxiliary, norms)

    def belong_to(self, module: nn.Module) -> bool:
        """Say whether ``module`` is the module they were taken from, with the norm layers it had."""
        if self.module() is not module:
            return False
        state = main_state_dict(module)
        return all(key in state and torch.equal(state[key].cpu(), value) for key, value in self.norms.items())

    def restore(self, module: nn.Module) -> None:
        """Give a module that was wrapped again its copies back, unless its norm layers are others now."""
        if self.belong_to(module) and set(auxiliary_state_dict(module)) == set(self.auxiliary):
            load_auxiliary_state_dict(module, self.auxiliary)
