"""Between the images that a model takes and the pixels in [0, 1] that are corrupted and attacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import Checker, check_dense
from entprop_wrap.errors import ConfigurationError, ImageError, LabelError, PixelRangeError
from entprop_wrap.utils.options import shown

__all__ = ["check_batch", "space_of", "to_images", "to_pixels"]


def space_of(pixel_space: PixelSpace | None) -> PixelSpace:
    """Return the pixel space that an option says; None: images are in [0, 1].

    Raises:
        ConfigurationError: It is something else.
    """
    if pixel_space is not None and not isinstance(pixel_space, PixelSpace):
        raise ConfigurationError(
            f"pixel_space must be a PixelSpace or None, found {shown(pixel_space)}. Write PixelSpace(mean, std), such "
            "as PixelSpace((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))."
        )
    return PixelSpace() if pixel_space is None else pixel_space


def to_pixels(images: Tensor, space: PixelSpace) -> Tensor:
    """Return images of ``space`` as pixels, clamped to [0, 1]: interpolation overshoots a little."""
    wide = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    return ((wide - space.bounds(wide)[0]) / space.scale(wide)).clamp(0, 1)


def to_images(pixels: Tensor, space: PixelSpace) -> Tensor:
    """Return pixels as images of ``space``."""
    return pixels * space.scale(pixels) + space.bounds(pixels)[0]


def check_batch(images: Any, labels: Any, space: PixelSpace, *, first: bool = False) -> Tensor:
    """Check a batch, and return the labels as int64 ``(N,)``.

    Args:
        images: Expected to be ``(N, C, H, W)``, floating point, and in ``space``.
        labels: Expected to be ``(N,)`` class indices.
        space: Pixel space of the images.
        first: Also check that the batch does not look as if it were in [0, 1] where ``space`` says otherwise.

    Raises:
        ConfigurationError: ``space`` is none.
        ImageError: Images of another type or shape, or not finite.
        PixelRangeError: Images out of ``space``.
        LabelError: Labels of another type or shape.
    """
    space_of(space)
    if not isinstance(images, Tensor):
        raise ImageError(f"Expected images as a tensor (N, C, H, W), found {type(images).__name__}.")
    if not isinstance(labels, Tensor):
        raise LabelError(f"Expected labels as a tensor of class indices (N,), found {type(labels).__name__}.")
    for name, tensor, error in (("images", images, ImageError), ("labels", labels, LabelError)):
        check_dense(name, tensor, error)
    shape = tuple(images.shape)
    if not images.is_floating_point():
        raise ImageError(
            f"Expected floating-point images, found {images.dtype}. Write images.float() / 255 for bytes, or let the "
            "data loader do it: torchvision.transforms.v2.ToDtype(torch.float32, scale=True)."
        )
    if images.ndim != 4:
        raise ImageError(f"Expected images of shape (N, C, H, W), found {shape}.")
    if shape[-1] in (1, 3, 4) and shape[1] not in (1, 3, 4):
        raise ImageError(f"Found images of shape {shape}, which looks like NHWC. Write images.permute(0, 3, 1, 2).")
    if space.channels not in (None, shape[1]):
        raise ImageError(f"Found {shape[1]} channels; pixel_space has a mean and std for {space.channels}.")
    if 0 in shape:
        raise ImageError(f"Found an empty batch of shape {shape}. Expected at least one image.")
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
    checker.first = wide.device.type != "cpu"  # an accelerator looks at the values of a first batch only
    checker.images(wide, space)
    return _class_indices(labels, shape[0])


def _class_indices(labels: Tensor, batch: int) -> Tensor:
    if labels.is_floating_point() and labels.ndim == 2:
        raise LabelError(
            f"Found soft labels of shape {tuple(labels.shape)}; accuracy needs one class for each image. Write "
            "labels.argmax(1), or leave MixUp out of the evaluation data."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise LabelError(f"Expected integer class indices, found {labels.dtype}. Write labels.long().")
    if tuple(labels.shape) != (batch,):
        raise LabelError(f"Expected {batch} class indices of shape ({batch},), found shape {tuple(labels.shape)}.")
    return labels.long()
