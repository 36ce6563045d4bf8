"""The logits in what a model returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entprop_wrap.errors import ModelOutputError


def logits_of(output: Any, batch: int, *, differentiable: bool = True, least: int = 2) -> Tensor:
    """Return the logits ``(N, C)``, C at least ``least``, in what a model returned.

    They are a tensor, ``.logits``, ``["logits"]``, or a tuple's first item.
    """
    logits = raw_logits(output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < least:
        found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        if isinstance(output, dict):
            found += f" with {sorted(map(str, output))}"
        raise ModelOutputError(
            f"Expected logits of shape ({batch}, C) with C > 1 from the model, as a tensor, a tuple's first item, or "
            f"under 'logits'; found {found}. Use a classification model. For one logit z pass a binary loss to train, "
            "loss=torch.nn.BCEWithLogitsLoss(), and to evaluate return torch.cat([-z, z], 1) / 2."
        )
    if differentiable and not logits.requires_grad:
        raise ModelOutputError(
            "The logits have no gradient. Leave out torch.no_grad() around the step, or detach() in the model."
        )
    # Losses, entropies and comparisons of logits are not to be trusted in half precision.
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def raw_logits(output: Any) -> Any:
    """Return what stands where a model's output has its logits, whatever it is."""
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output.get("logits") if isinstance(output, dict) else output
    return logits[0] if isinstance(logits, (tuple, list)) and logits else logits
