"""Other views of a step's images: augmentations in pixel space, drawn from the step's generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entprop_wrap.data.augmentation import AUGMENTATIONS, augmentation
from entprop_wrap.errors import ConfigurationError, ImageError
from entprop_wrap.utils.options import shown

if TYPE_CHECKING:
    from entprop_wrap.methods.step import Step

#: Floating-point pixels ``(N, C, H, W)`` in [0, 1] to as many of the same shape.
Augmentation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EachImage:
    """An augmentation of :func:`entprop_wrap.data.augmentation.augmentation` by name, drawn anew for each image."""

    name: str

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the pixels ``(N, C, H, W)``, rounded to bytes and augmented."""
        if self.name != "gaussian" and pixels.shape[1] not in (1, 3):
            raise ImageError(
                f"view={self.name!r} is torchvision's, of images with 1 or 3 channels; found {pixels.shape[1]}. Write "
                "view='gaussian', or a function of pixels (N, C, H, W) in [0, 1]."
            )
        change = augmentation(self.name)
        return torch.stack([change(image) for image in pixels.mul(255).round().to(torch.uint8)]).to(pixels) / 255


def find_augmentation(view: str | Augmentation) -> Augmentation:
    """Return the augmentation that ``view`` is, or names."""
    if isinstance(view, str) and view in AUGMENTATIONS:
        return EachImage(view)
    if not callable(view) or isinstance(view, type):
        raise ConfigurationError(
            f"view must be None, one of {', '.join(map(repr, AUGMENTATIONS))}, or a function of pixels (N, C, H, W) in "
            f"[0, 1]; found {shown(view)}."
        )
    return view


def augmented(step: Step, images: Tensor, change: Augmentation, name: str) -> Tensor:
    """Return ``images`` of the step, changed in pixel space; ``name`` says in messages whose augmentation it is."""
    with torch.no_grad(), _default_generator_following(step.generator):
        pixels = change(step.space.to_pixels(images))
    if not isinstance(pixels, Tensor) or pixels.shape != images.shape or not pixels.is_floating_point():
        found = f"{pixels.dtype} of shape {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else repr(pixels)
        raise ImageError(
            f"The augmentation {name} must return floating-point pixels of shape {tuple(images.shape)}, found {found}."
        )
    # In the memory format of the images, which stacking or torchvision drops.
    changed = torch.empty_like(images).copy_(step.space.to_images(pixels.to(images).clamp(0, 1)))
    step.checker.images(changed, step.space)
    return changed


@contextmanager
def _default_generator_following(generator: torch.Generator | None) -> Iterator[None]:
    """Seed torch's default CPU generator from ``generator`` within the block, and put its state back; None: do not."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(before)
