"""Small operations on tensors that no library has."""

from __future__ import annotations

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError


def to_device(drawn: Tensor, device: torch.device) -> Tensor:
    """Return on ``device`` what was drawn on the CPU, without waiting for what the device is at."""
    return drawn.to(device, non_blocking=device.type == "cuda")  # elsewhere it may be read after its memory is free


def index_rows(images: Tensor, rows: Tensor) -> Tensor:
    """Return ``images[rows]`` as a new tensor, in its memory format (plain indexing drops channels_last)."""
    taken = images.index_select(0, to_device(rows, images.device))
    if images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last):
        taken = taken.contiguous(memory_format=torch.channels_last)
    return taken


def refuse_inference_mode() -> None:
    """Raise :class:`ConfigurationError` under ``torch.inference_mode()``, where nothing has gradients."""
    if torch.is_inference_mode_enabled():
        raise ConfigurationError(
            "Gradients are needed, and torch.inference_mode() is on, which torch.enable_grad() does not lift. Write "
            "with torch.inference_mode(False): around the call, with a model and data that were made outside it."
        )
