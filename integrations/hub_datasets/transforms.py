"""Transforms for training and evaluation: a PIL image or uint8 tensor in, a float tensor in [0, 1] out."""

from collections.abc import Callable
from typing import Any

import torch
from torchvision.transforms import v2

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.integrations.hub_datasets.formats import ImageFormat

__all__ = ["eval_transform", "train_transform"]


def train_transform(
    size: int | tuple[int, int] | ImageFormat,
    *,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    normalize: Any = None,
) -> v2.Compose:
    """A random resized crop and a horizontal flip.

    Args:
        size: Of the result, pixels: one number, ``(height, width)``, or an `ImageFormat`.
        scale: Smallest and largest area of the crop, as fractions of the image, in (0, 1]. The default suits
            fine-tuning; training from scratch usually takes (0.08, 1).
        ratio: Smallest and largest width / height of the crop.
        flip: Probability of the flip.
        normalize: ``(mean, std)``, one number or one per channel; or anything with ``.mean`` and ``.std``, such as a
            `PixelSpace`. By default what the `ImageFormat` says, else none: the training step takes pixels in [0, 1]
            as well as normalised ones, as long as its own pixel space says which.

    Returns:
        A picklable callable, from a PIL image or a uint8 tensor ``(3, H, W)`` to a float32 tensor
        ``(3, height, width)`` in [0, 1], or normalised.

    Raises:
        ConfigurationError: An argument is out of its range.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigurationError(f"Expected 0 < scale[0] <= scale[1] <= 1, found scale={scale}.")
    if not 0 < ratio[0] <= ratio[1]:
        raise ConfigurationError(f"Expected 0 < ratio[0] <= ratio[1], found ratio={ratio}.")
    if not 0 <= flip <= 1:
        raise ConfigurationError(f"Expected flip as a probability in [0, 1], found {flip}.")
    target = _format(size, None, normalize)
    crop = v2.RandomResizedCrop(target.size, scale, ratio, target.interpolation, antialias=True)
    return _compose(target, crop, v2.RandomHorizontalFlip(flip))


def eval_transform(
    size: int | tuple[int, int] | ImageFormat,
    *,
    resize: int | tuple[int, int] | None = None,
    normalize: Any = None,
) -> v2.Compose:
    """Resize the short side, then crop the centre.

    Args:
        size: Of the result, pixels: one number, ``(height, width)``, or an `ImageFormat`.
        resize: The short side before the crop, pixels; ``(height, width)`` to change the aspect instead. By default
            what the `ImageFormat` says, else ``size / 0.875`` (224 of 256), the usual choice on ImageNet.
        normalize: As for `train_transform`.

    Returns:
        A picklable callable, from a PIL image or a uint8 tensor ``(3, H, W)`` to a float32 tensor
        ``(3, height, width)`` in [0, 1], or normalised.

    Raises:
        ConfigurationError: An argument is out of its range.
    """
    target = _format(size, resize, normalize)
    shorter = v2.Resize(target.resize, target.interpolation, antialias=True)
    return _compose(target, shorter, v2.CenterCrop(target.size))


def _compose(target: ImageFormat, *steps: Callable[[Any], Any]) -> v2.Compose:
    chain: list[Callable[[Any], Any]] = [v2.ToImage(), *steps, v2.ToDtype(torch.float32, scale=True)]
    if target.mean is not None and target.std is not None:
        chain.append(v2.Normalize(list(target.mean), list(target.std)))
    # A plain tensor: a tv_tensors.Image would carry its subclass, and its overhead, into the model.
    return v2.Compose([*chain, v2.ToPureTensor()])


def _format(
    size: int | tuple[int, int] | ImageFormat, resize: int | tuple[int, int] | None, normalize: Any
) -> ImageFormat:
    if isinstance(size, ImageFormat):
        mean, std = (size.mean, size.std) if normalize is None else _mean_std(normalize)
        return ImageFormat(size.size, resize or size.resize, mean, std, size.interpolation)
    if not isinstance(size, (int, tuple)) or (isinstance(size, tuple) and len(size) != 2):
        raise ConfigurationError(
            f"Expected size as pixels, (height, width) or an ImageFormat, found {type(size).__name__}: for an image "
            "processor write image_format(processor)."
        )
    sides = (size, size) if isinstance(size, int) else size
    mean, std = _mean_std(normalize)
    return ImageFormat(sides, resize if resize is not None else round(min(sides) / 0.875), mean, std)


def _mean_std(normalize: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if normalize is None:
        return None, None
    if hasattr(normalize, "mean") and hasattr(normalize, "std"):
        normalize = (normalize.mean, normalize.std)
    try:
        mean, std = normalize
        return _three(mean), _three(std)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            "Expected normalize=(mean, std) with one number per channel, or an object with .mean and .std, found "
            f"{normalize!r}."
        ) from error


def _three(values: Any) -> tuple[float, ...]:
    """One number for all channels, or one for each."""
    numbers = tuple(float(value) for value in (values if hasattr(values, "__iter__") else (values,)))
    return numbers * 3 if len(numbers) == 1 else numbers
