"""Checks of the batches of an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import Checker, check_images, check_labels
from entprop_wrap.errors import LabelError, PixelRangeError

__all__ = ["check_batch"]


def check_batch(images: Any, labels: Any, space: PixelSpace, *, first: bool = False) -> Tensor:
    """Check a batch of floating-point ``(N, C, H, W)`` images in ``space``; return the class indices as int64 ``(N,)``.

    On the ``first`` batch, also check that it does not look as if it were in [0, 1] where ``space`` says otherwise.
    """
    check_images(images, space, half=True)
    wide = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    if first:
        low, high = (float(value) for value in torch.aminmax(wide))
        # Natural images do not fill [0, 1] so exactly once they are normalised.
        if 0 <= low < 0.02 and 0.98 < high <= 1 and float(space.bounds(wide)[0].max()) <= -0.5:
            raise PixelRangeError(
                f"The first batch spans [{low:.2f}, {high:.2f}], which is pixels in [0, 1], but pixel_space={space} "
                "says that images are normalised. Leave pixel_space out, or normalise in the data loader."
            )
    checker = Checker()
    checker.space_told = not first
    checker.images(wide, space)
    if isinstance(labels, Tensor) and not labels.is_meta:
        labels = labels.to(images.device)
        if labels.is_floating_point():
            soft = labels.ndim == 2 and labels.shape[1] > 1
            write = "labels.argmax(1), or leave MixUp out of the evaluation data" if soft else "labels.long().flatten()"
            raise LabelError(
                f"Expected one class index for each image, found {labels.dtype} labels {tuple(labels.shape)}. Write "
                f"{write}."
            )
    return check_labels(labels, images)
