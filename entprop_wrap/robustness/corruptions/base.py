"""What every corruption does before and after its own work: check, pick the constants, clip, cast back.

Two tables of constants were published, one for 224 px and one for 32 px (Hendrycks & Dietterich 2019, "Benchmarking
Neural Network Robustness to Common Corruptions and Perturbations", section 4 and its released code). Images with a
short side below :data:`SMALL_SIDE` take those of CIFAR-C, all others those of ImageNet-C. Most constants are absolute
pixels, and they are used as they are at sizes other than 32 and 224: a blur of 10 px is a stronger corruption of a
112 px image than of a 448 px one. Where a constant was published as a fraction of the side
(``elastic_transform``, ``pixelate``), it stays a fraction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from entprop_wrap.data.validation import check_dense
from entprop_wrap.errors import ImageError, PixelRangeError
from entprop_wrap.utils.options import check_integer

__all__ = ["LEAST_SIDE", "SMALL_SIDE", "Corruption", "Levels", "begin", "finish", "in_slices"]

#: The smallest height and width, in pixels, that the constants of CIFAR-C make sense for.
LEAST_SIDE = 32

#: Images with a short side below this, in pixels, take the constants of CIFAR-C.
SMALL_SIDE = 96

# Resizing with antialiasing rounds a white pixel to 1.0000001; that is not a mistake of the caller.
_ROUNDING = 1e-6

# How many values a CPU works on at once: what stays in its caches, and in memory that is already mapped, is up to
# several times as fast as what does not. One image of 224 px.
_SLICE = 150_528

Constants = TypeVar("Constants")
Five = tuple[float, float, float, float, float]


class Corruption(Protocol):
    """A corruption: images ``(N, 3, H, W)`` in [0, 1] and a severity in, new images of the same kind out."""

    @property
    def __name__(self) -> str:
        """The name it has in the tables."""

    def __call__(self, images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
        """Corrupt images.

        Args:
            images: ``(N, 3, H, W)`` in [0, 1], at least 32 px.
            severity: 1 (mild) to 5 (strong).
            generator: CPU generator that seeds the images; None for torch's default one. Corruptions that draw nothing
                leave it alone.

        Returns:
            New images of the same shape, dtype and device, clipped to [0, 1].

        Raises:
            ConfigurationError: ``severity`` is not an int from 1 to 5, or ``generator`` is not on the CPU.
            ImageError: ``images`` is not such a batch, or holds values that are not finite.
            PixelRangeError: Values lie outside [0, 1].
        """


def in_slices(imagenet: float = 1.0, cifar: float = 1.0) -> Callable[[Corruption], Corruption]:
    """Check the images, and let a corruption work on a few at a time on a CPU.

    The result is the same as at once, since seeds are per image.

    Args:
        imagenet: How much larger the slices are than :data:`_SLICE` for images that take the constants of ImageNet-C.
        cifar: The same for those that take the constants of CIFAR-C.

    Raises (when the corruption is called):
        ImageError: ``images`` is not a non-empty floating point batch ``(N, 3, H, W)`` of at least 32 px, or it
            holds values that are not finite.
        PixelRangeError: Values lie outside [0, 1].
    """

    def decorate(corruption: Corruption) -> Corruption:
        @functools.wraps(corruption)
        def sliced(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
            _check(images)  # all of them, before the first seed is drawn
            factor = cifar if min(images.shape[-2:]) < SMALL_SIDE else imagenet
            count = max(1, int(_SLICE * factor) // images[0].numel())
            if images.device.type != "cpu" or len(images) <= count:
                return corruption(images, severity, generator)
            result = images.new_empty(images.shape)
            for at in range(0, len(images), count):
                result[at : at + count] = corruption(images[at : at + count], severity, generator)
            return result

        return sliced

    return decorate


@dataclass(frozen=True)
class Levels(Generic[Constants]):
    """The constants of one corruption at severities 1 to 5, for both sizes."""

    imagenet: tuple[Constants, Constants, Constants, Constants, Constants]
    cifar: tuple[Constants, Constants, Constants, Constants, Constants]

    @staticmethod
    def of(unit: float, imagenet: Five, cifar: Five | None = None) -> Levels[float]:
        """Return constants in units of ``unit``, the same for both sizes if only one table was published."""
        scaled = [tuple(unit * level for level in levels) for levels in (imagenet, cifar or imagenet)]
        return Levels(*cast(list[Five], scaled))

    def at(self, severity: int, short_side: int) -> Constants:
        """Return the constants of ``severity`` (1 to 5) for images whose short side is ``short_side`` pixels."""
        return (self.cifar if short_side < SMALL_SIDE else self.imagenet)[severity - 1]


def begin(images: Tensor, severity: int, levels: Levels[Constants]) -> tuple[Tensor, Constants]:
    """Check the severity and return the pixels to work on, with the constants that apply to them.

    The images have been checked by :func:`in_slices`. The pixels are detached: a corruption is part of a measurement,
    and rounding or swapping pixels has no useful gradient. Half precision is worked on in float32.

    Raises:
        ConfigurationError: ``severity`` is not an int from 1 to 5.
    """
    severity = check_integer("severity", severity, 1, 5)
    pixels = images.detach()
    if pixels.dtype in (torch.float16, torch.bfloat16):
        pixels = pixels.float()
    return pixels, levels.at(severity, min(images.shape[-2:]))


def finish(pixels: Tensor, images: Tensor) -> Tensor:
    """Clip the result to [0, 1] and give it the dtype of the images it was made from."""
    return pixels.clamp(0.0, 1.0).to(images.dtype)


def _check(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise ImageError(f"images must be a tensor (N, 3, H, W), found {type(images).__name__}.")
    check_dense("images", images, ImageError)
    if images.dim() != 4 or images.shape[1] != 3:
        hint = "; add the batch dimension with images.unsqueeze(0)" if images.dim() == 3 else ""
        if images.dim() == 4 and images.shape[-1] == 3:
            hint = "; move the channels with images.permute(0, 3, 1, 2)"
        elif images.dim() == 4 and images.shape[1] == 1:
            hint = "; repeat grey images with images.expand(-1, 3, -1, -1)"
        raise ImageError(f"images must have shape (N, 3, H, W), found {tuple(images.shape)}{hint}.")
    if not images.is_floating_point():
        raise ImageError(
            f"images must be floating point in [0, 1], found {images.dtype}; write images.float() / 255 for bytes."
        )
    if images.shape[0] == 0:
        raise ImageError(f"images must hold at least one image, found the empty batch {tuple(images.shape)}.")
    if min(images.shape[-2:]) < LEAST_SIDE:
        raise ImageError(
            f"images must be at least {LEAST_SIDE} px high and wide, found {tuple(images.shape[-2:])}; "
            "the published constants are for 32 and 224 px, so enlarge the images first."
        )
    low, high = (value.item() for value in torch.aminmax(images.detach()))
    if not (low > -float("inf") and high < float("inf")):  # NaN compares false
        raise ImageError("images must be finite, found NaN or infinite values.")
    if low < -_ROUNDING or high > 1.0 + _ROUNDING:
        hint = "divide bytes by 255" if low >= 0.0 and high > 2.0 else "undo the normalisation, or clamp, first"
        raise PixelRangeError(f"images must lie in [0, 1], found [{low:.4g}, {high:.4g}]; {hint}.")
