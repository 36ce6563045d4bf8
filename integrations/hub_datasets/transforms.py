"""Transforms for training and evaluation: a PIL image or uint8 tensor in, a float tensor in [0, 1] out."""

import torch
from torchvision.transforms import v2

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError


def train_transform(
    size: int | tuple[int, int],
    *,
    scale: tuple[float, float] = (0.35, 1.0),
    flip: float = 0.5,
    normalize: PixelSpace | None = None,
) -> v2.Compose:
    """Return a random resized crop and a horizontal flip.

    Args:
        size: Size of the result, pixels: one number, or ``(height, width)``.
        scale: Smallest and largest area of the crop, as fractions of the image, in (0, 1]. The default suits
            fine-tuning; training from scratch usually takes (0.08, 1).
        flip: Probability of the flip.
        normalize: What to normalise with. None: nothing, as the training step takes pixels in [0, 1] as well as
            normalised ones, as long as its own pixel space says which.

    Returns:
        A picklable callable, from a PIL image or a uint8 tensor ``(3, H, W)`` to a float32 tensor
        ``(3, height, width)`` in [0, 1], or normalised.

    Raises:
        ConfigurationError: ``scale`` is out of its range, which torchvision would take.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigurationError(f"scale must be (smallest, largest) area in (0, 1], found {scale}.")
    return _compose(normalize, v2.RandomResizedCrop(size, scale, antialias=True), v2.RandomHorizontalFlip(flip))


def eval_transform(
    size: int | tuple[int, int], *, resize: int | tuple[int, int] | None = None, normalize: PixelSpace | None = None
) -> v2.Compose:
    """Return a resize of the short side and a central crop.

    Args:
        size: Size of the result, pixels: one number, or ``(height, width)``.
        resize: The short side before the crop, pixels; ``(height, width)`` to change the aspect instead. By default
            ``size / 0.875`` (256 for 224), the usual choice on ImageNet.
        normalize: As for `train_transform`, which says what comes out.
    """
    if resize is None:
        resize = round((size if isinstance(size, int) else min(size)) / 0.875)
    return _compose(normalize, v2.Resize(resize, antialias=True), v2.CenterCrop(size))


def _compose(space: PixelSpace | None, *steps: torch.nn.Module) -> v2.Compose:
    normalize = [] if space is None else [v2.Normalize(list(space.mean), list(space.std))]
    # A plain tensor: a tv_tensors.Image would carry its subclass, and its overhead, into the model.
    return v2.Compose([v2.ToImage(), *steps, v2.ToDtype(torch.float32, scale=True), *normalize, v2.ToPureTensor()])
