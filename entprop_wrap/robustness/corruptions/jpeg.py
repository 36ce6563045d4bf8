"""JPEG compression (Hendrycks & Dietterich 2019, section 4.1), by Pillow, on the CPU."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import corruption
from entprop_wrap.robustness.corruptions.random import Draws

__all__ = ["jpeg_compression"]


@corruption((25, 18, 15, 10, 7), (80, 65, 58, 50, 40))
def jpeg_compression(pixels: Tensor, draws: Draws, quality: int) -> Tensor:
    """Round to bytes, compress as JPEG, and decompress. Nothing is drawn."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("jpeg_compression needs Pillow: pip install pillow.") from error
    decoded = []
    for image in (pixels * 255.0).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(decoded).permute(0, 3, 1, 2).to(pixels) / 255.0
