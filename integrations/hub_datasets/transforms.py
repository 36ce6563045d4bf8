"""Transforms for training and evaluation: a PIL image or uint8 tensor in, a float tensor in [0, 1] out."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Resampling
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.utils.options import check_number

__all__ = ["ImageFormat", "eval_transform", "image_format", "train_transform"]


@dataclass(frozen=True)
class ImageFormat:
    """The images a model takes.

    Attributes:
        size: Height and width into the model, pixels.
        resize: In evaluation, the short side before the central crop; ``(height, width)`` to change the aspect instead.
        space: What the model wants its images normalised with.
        interpolation: Interpolation of every resize.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    space: PixelSpace = PixelSpace()  # noqa: RUF009 - frozen, too
    interpolation: InterpolationMode = InterpolationMode.BILINEAR

    def __post_init__(self) -> None:
        sides = (*self.size, *(self.resize if isinstance(self.resize, tuple) else (self.resize,)))
        if len(self.size) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ConfigurationError(
                f"Expected positive numbers of pixels, found size={self.size}, resize={self.resize}."
            )
        if self.space.channels not in (None, 3):
            raise ConfigurationError(f"Expected mean and std of 3 channels (images are RGB), found {self.space}.")


def image_format(processor: Any) -> ImageFormat:
    """Return the format that a Hugging Face image processor describes.

    `eval_transform` of it does what the processor does, to within a pixel where an odd number is cropped away; for
    training take `train_transform` of it.

    Raises:
        ConfigurationError: No resize to a fixed size, or pixels that are not scaled RGB.
    """
    size, crop = _sides(processor, "size"), _sides(processor, "crop_size")
    crops = bool(getattr(processor, "do_center_crop", False) and crop)
    expected = {"do_rescale": True, "do_flip_channel_order": False, "do_resize": True}
    other = {key: getattr(processor, key) for key, value in expected.items() if getattr(processor, key, value) != value}
    if other or not ("shortest_edge" in size or {"height", "width"} <= set(size)):
        raise ConfigurationError(
            "Expected a processor that rescales RGB pixels and resizes to 'shortest_edge' or to 'height' and 'width', "
            f"found {type(processor).__name__} with size={size} {other or ''}: pass ImageFormat(size=(224, 224), "
            "resize=256, space=PixelSpace(mean, std)) instead."
        )
    resize: int | tuple[int, int]
    if "height" in size:
        resize = square = (size["height"], size["width"])
    else:
        resize, square = size["shortest_edge"], (size["shortest_edge"],) * 2
        fraction = getattr(processor, "crop_pct", None)
        if fraction and not crops and resize >= 384:
            resize = square  # ConvNeXT: no crop from 384 px on, the aspect changes instead
        elif fraction:
            resize = int(resize / fraction)
        elif type(processor).__name__.startswith("Levit"):
            resize = int(resize * 256 / 224)  # LeViT's `size` is that of the crop
    if crops:
        square = (crop["height"], crop["width"]) if "height" in crop else (crop["shortest_edge"],) * 2
    resample = getattr(processor, "resample", None)
    mode = InterpolationMode(Resampling(2 if resample is None else int(resample)).name.lower())
    return ImageFormat(square, resize, PixelSpace.from_processor(processor), mode)


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


def _sides(processor: Any, name: str) -> dict[str, int]:
    """Return ``size`` or ``crop_size``: an int, a dict, or a dict-like object whose unused fields are None."""
    value = getattr(processor, name, None)
    if isinstance(value, int):
        return {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
    return {key: side for key, side in dict(value or {}).items() if side is not None}
