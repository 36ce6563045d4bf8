"""The frame of all corruptions: checked images, the published constants, work in slices, valid pixels.

Two tables of constants were published, for 224 px and for 32 px (Hendrycks & Dietterich 2019, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations", section 4). Images with a short side below
:data:`SMALL_SIDE` take those of CIFAR-C, all others those of ImageNet-C. Most constants are absolute pixels and are
used as they are at every size; those published as fractions of the side (``elastic_transform``, ``pixelate``) stay
fractions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import check_images
from entprop_wrap.errors import ConfigurationError, ImageError, PixelRangeError
from entprop_wrap.robustness.corruptions.random import Draws
from entprop_wrap.utils.options import check_integer, shown

#: The smallest height and width, in pixels, that the constants of CIFAR-C make sense for.
_LEAST_SIDE = 32
#: Images with a short side below this, in pixels, take the constants of CIFAR-C.
SMALL_SIDE = 96
# Resizing with antialiasing rounds a white pixel to 1.0000001; that is not a mistake of the caller.
_ROUNDING = 1e-6
# Values that a CPU works on at once, one image of 224 px: what stays in its caches is several times as fast.
_SLICE = 150_528

_PIXELS = PixelSpace()


class Corruption:
    """A corruption: images in [0, 1] and a severity in, new images of the same kind out. See :func:`corruption`."""

    __name__: str

    #: How much more a CPU works on at once than ``_SLICE``, for large images and for small ones.
    slices: tuple[float, float] = (1.0, 1.0)

    def __init__(self, function: Callable[..., Tensor], constants: Sequence[Sequence[Any]]) -> None:
        self._function, self._constants = function, constants
        functools.update_wrapper(self, function)
        del self.__wrapped__  # type: ignore[attr-defined]  # its signature is not the one of the call

    def __call__(self, images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
        """Corrupt images.

        Args:
            images: ``(N, 3, H, W)``, floating point in [0, 1], at least 32 px.
            severity: 1 (mild) to 5 (strong).
            generator: CPU generator of one seed for each image; None: torch's default. Corruptions that draw nothing
                leave it alone.

        Returns:
            New images of the same shape, dtype and device, clipped to [0, 1].

        Raises:
            ConfigurationError: ``severity`` is not an integer from 1 to 5, or ``generator`` is not on the CPU.
            ImageError: ``images`` is not such a batch, or holds values that are not finite.
            PixelRangeError: Values lie outside [0, 1].
        """
        severity = check_integer("severity", severity, 1, 5)
        _check(images)  # all of them, before the first seed is drawn
        small = min(images.shape[-2:]) < SMALL_SIDE
        constants = self._constants[small][severity - 1]
        constants = constants if isinstance(constants, tuple) else (constants,)
        on_cpu = images.device.type == "cpu"
        count = max(1, int(_SLICE * self.slices[small]) // images[0].numel()) if on_cpu else len(images)
        result = images.new_empty(images.shape)
        for part, into in zip(torch.split(images.detach(), count), torch.split(result, count), strict=True):
            half = part.dtype in (torch.float16, torch.bfloat16)
            pixels = part.float() if half else part.clone()  # which a corruption may work on in place
            with torch.autocast(images.device.type, enabled=False):
                corrupted: Any = self._function(pixels, Draws(pixels, generator), *constants)
            found = tuple(corrupted.shape) if isinstance(corrupted, Tensor) else type(corrupted).__name__
            if found != tuple(part.shape):  # copying would broadcast one channel to three
                raise ImageError(f"The corruption must return pixels of shape {tuple(part.shape)}, found {found}.")
            into.copy_(corrupted.clamp(0.0, 1.0))
        return result


def corruption(
    imagenet: tuple[Any, ...], cifar: tuple[Any, ...] | None = None
) -> Callable[[Callable[..., Tensor]], Corruption]:
    """Make a :class:`Corruption` of the function below, ``(pixels, draws, *constants) -> pixels``.

    Its pixels ``(N, 3, H, W)`` are in [0, 1], detached and at least float32; the result is clipped. What is random
    comes from ``draws``, by ``uniform``, ``normal`` or ``below``.

    Args:
        imagenet: Constants at severities 1 to 5, numbers or tuples.
        cifar: The same for images below 96 px; None: the same ones.

    Raises:
        ConfigurationError: Not one constant for each severity.
    """
    tables = imagenet, imagenet if cifar is None else cifar
    for table in tables:
        if not isinstance(table, (list, tuple)) or len(table) != 5:
            raise ConfigurationError(f"Expected the constants of severities 1 to 5 as a tuple, found {shown(table)}.")
    return lambda function: Corruption(function, tables)


def _check(images: Tensor) -> None:
    check_images(images, _PIXELS, half=True)
    if images.shape[1] != 3:
        raise ImageError(f"Expected 3 channels, found {images.shape[1]}. Write images.expand(-1, 3, -1, -1) if grey.")
    if min(images.shape[-2:]) < _LEAST_SIDE:
        raise ImageError(
            f"Expected images of at least {_LEAST_SIDE} px, found {tuple(images.shape[-2:])}. Enlarge them first: the "
            "published constants are for 32 and 224 px."
        )
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (low > -float("inf") and high < float("inf")):  # NaN compares false
        raise ImageError("Found images that are not finite (NaN or infinity). Look at the data or its augmentation.")
    if low < -_ROUNDING or high > 1.0 + _ROUNDING:
        raise PixelRangeError(
            f"Expected images in [0, 1], found [{low:.4g}, {high:.4g}]. Divide bytes by 255, or undo the normalisation."
        )
