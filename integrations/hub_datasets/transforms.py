"""Transforms for training and evaluation: a PIL image or uint8 tensor in, a float tensor in [0, 1] out."""

import dataclasses
from typing import Any

import torch
from torchvision.transforms import v2

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.integrations.hub_datasets.formats import ImageFormat
from entprop_wrap.utils.options import check_number

__all__ = ["eval_transform", "train_transform"]


def train_transform(
    size: int | tuple[int, int] | ImageFormat,
    *,
    scale: tuple[float, float] = (0.35, 1.0),
    flip: float = 0.5,
    normalize: Any = None,
) -> v2.Compose:
    """Return a random resized crop and a horizontal flip.

    Args:
        size: Size of the result, pixels: one number, ``(height, width)``, or an `ImageFormat`.
        scale: Smallest and largest area of the crop, as fractions of the image, in (0, 1]. The default suits
            fine-tuning; training from scratch usually takes (0.08, 1).
        flip: Probability of the flip.
        normalize: A `PixelSpace` or ``(mean, std)``. By default what the `ImageFormat` says, else none: the training
            step takes pixels in [0, 1] as well as normalised ones, as long as its own pixel space says which.

    Returns:
        A picklable callable, from a PIL image or a uint8 tensor ``(3, H, W)`` to a float32 tensor
        ``(3, height, width)`` in [0, 1], or normalised.

    Raises:
        ConfigurationError: An argument is out of its range.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigurationError(f"scale must be (smallest, largest) area in (0, 1], found {scale}.")
    check_number("flip", flip, lambda chance: 0 <= chance <= 1, "from 0 to 1")
    target = _format(size, None, normalize)
    crop = v2.RandomResizedCrop(target.size, scale, interpolation=target.interpolation, antialias=True)
    return _compose(target, crop, v2.RandomHorizontalFlip(flip))


def eval_transform(
    size: int | tuple[int, int] | ImageFormat,
    *,
    resize: int | tuple[int, int] | None = None,
    normalize: Any = None,
) -> v2.Compose:
    """Return a resize of the short side and a central crop.

    Args:
        size: Size of the result, pixels: one number, ``(height, width)``, or an `ImageFormat`.
        resize: The short side before the crop, pixels; ``(height, width)`` to change the aspect instead. By default
            what the `ImageFormat` says, else ``size / 0.875`` (224 of 256), the usual choice on ImageNet.
        normalize: As for `train_transform`, which says what comes out.
    """
    target = _format(size, resize, normalize)
    shorter = v2.Resize(target.resize, target.interpolation, antialias=True)
    return _compose(target, shorter, v2.CenterCrop(target.size))


def _compose(target: ImageFormat, *steps: torch.nn.Module) -> v2.Compose:
    chain = [v2.ToImage(), *steps, v2.ToDtype(torch.float32, scale=True)]
    if target.space != PixelSpace():
        chain.append(v2.Normalize(list(target.space.mean), list(target.space.std)))
    # A plain tensor: a tv_tensors.Image would carry its subclass, and its overhead, into the model.
    return v2.Compose([*chain, v2.ToPureTensor()])


def _format(size: Any, resize: int | tuple[int, int] | None, normalize: Any) -> ImageFormat:
    if not isinstance(size, (int, tuple, ImageFormat)):
        raise ConfigurationError(
            f"Expected size as pixels, (height, width) or an ImageFormat, found {type(size).__name__}: for an image "
            "processor write image_format(processor)."
        )
    if normalize is not None and not isinstance(normalize, PixelSpace):
        if not isinstance(normalize, (tuple, list)) or len(normalize) != 2:
            raise ConfigurationError(f"Expected normalize as a PixelSpace or (mean, std), found {normalize!r}.")
        normalize = PixelSpace(*normalize)
    if isinstance(size, ImageFormat):
        form = size
    else:
        sides = (size, size) if isinstance(size, int) else size
        form = ImageFormat(sides, round(min(sides) / 0.875))
    return dataclasses.replace(form, resize=form.resize if resize is None else resize, space=normalize or form.space)
