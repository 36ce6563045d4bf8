"""Augmentations that mix two images of a batch and so raise entropy: MixUp and CutMix.

A mixer draws a :class:`Mix` for a batch; a mix is a linear map of the batch that can also be applied to gradients.
Write your own mixer as any object with a ``draw`` method that returns an object with ``partner``, ``share`` and
``apply``.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.utils.options import check_generator, check_number, store_as_python
from entprop_wrap.utils.tensors import index_rows

__all__ = ["CutMix", "Mix", "MixUp", "Mixer", "find_mixer"]


class Mix(Protocol):
    """One drawn mix of a batch of N images.

    Attributes:
        partner: ``(N,)`` int64 on the CPU: image i is mixed with image ``partner[i]``.
        share: How much of image i is left in its mixture, between 0 and 1.
    """

    @property
    def partner(self) -> Tensor: ...  # noqa: D102

    @property
    def share(self) -> float: ...  # noqa: D102

    def apply(self, images: Tensor) -> Tensor:
        """Return the mixtures of ``images`` ``(N, C, H, W)``; the input is not changed."""
        ...


class Mixer(Protocol):
    """Draws one mix per batch."""

    def draw(self, shape: torch.Size, generator: torch.Generator | None) -> Mix:
        """Draw a mix for images of ``shape`` ``(N, C, H, W)`` from a CPU generator (None: torch's default)."""
        ...


@dataclass(frozen=True)
class _Blend:
    partner: Tensor
    share: float

    def apply(self, images: Tensor) -> Tensor:
        return index_rows(images, self.partner).lerp_(images, self.share)


@dataclass(frozen=True)
class _Paste:
    partner: Tensor
    share: float
    box: tuple[slice, slice]

    def apply(self, images: Tensor) -> Tensor:
        rows, columns = self.box
        mixed = images.clone()
        mixed[:, :, rows, columns] = index_rows(images[:, :, rows, columns], self.partner)
        return mixed


@dataclass(frozen=True)
class MixUp:
    """MixUp: ``share * x + (1 - share) * x[partner]`` with one ``share ~ Beta(alpha, alpha)`` per batch.

    Source: Zhang et al., ICLR 2018, equation 1; one share per batch and a random permutation as in its official code.

    Attributes:
        alpha: Shape of the Beta distribution, above 0; 1 is uniform (EntProp: 1 on small datasets, 0.2 on ImageNet).
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_alpha(self)

    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Mix:
        """Draw a mix for images of ``shape`` ``(N, C, H, W)``."""
        share = _random(generator).betavariate(self.alpha, self.alpha)
        return _Blend(torch.randperm(shape[0], generator=generator, device="cpu"), share)


@dataclass(frozen=True)
class CutMix:
    """CutMix: a box of ``x[partner]``, of area ``1 - share``, pasted into ``x``; ``share ~ Beta(alpha, alpha)``.

    The box is clipped at the border and ``share`` corrected to the area that is left. Source: Yun et al., ICCV 2019,
    section 3.1.

    Attributes:
        alpha: Shape of the Beta distribution, above 0; 1 is uniform.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_alpha(self)

    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Mix:
        """Draw a mix for images of ``shape`` ``(N, C, H, W)``."""
        dice = _random(generator)
        height, width = shape[-2:]
        side = math.sqrt(1 - dice.betavariate(self.alpha, self.alpha))
        rows = _interval(dice.randrange(height), side * height, height)
        columns = _interval(dice.randrange(width), side * width, width)
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        partner = torch.randperm(shape[0], generator=generator, device="cpu")
        return _Paste(partner, 1 - area / (height * width), (rows, columns))


def find_mixer(mix: Mixer | str | None, alpha: float | None = None) -> Mixer | None:
    """Return the mixer that ``mix`` is, or names: "mixup", "cutmix", "none"; with another ``alpha`` if it is given.

    Raises:
        ConfigurationError: There is none of that name, or it has no alpha.
    """
    found: Any = (
        {"mixup": MixUp(), "cutmix": CutMix(), "none": None}.get(mix.lower(), mix) if isinstance(mix, str) else mix
    )
    if found is not None and (isinstance(found, type) or not hasattr(found, "draw")):
        raise ConfigurationError(
            f"mix must be a mixer such as MixUp(alpha=1.0), 'mixup', 'cutmix', or None; found {mix!r}."
        )
    if alpha is None:
        return cast("Mixer | None", found)
    if not isinstance(found, (MixUp, CutMix)):
        raise ConfigurationError(f"alpha is for MixUp and CutMix; found alpha={alpha!r} with mix={mix!r}.")
    return replace(found, alpha=alpha)


def _interval(centre: int, length: float, limit: int) -> slice:
    half = int(length) // 2
    return slice(max(centre - half, 0), min(centre + half, limit))


def _random(generator: torch.Generator | None) -> random.Random:
    # torch has no public Beta draw that takes a generator; this one follows torch's seed, and is exact in float64.
    check_generator(generator)
    return random.Random(int(torch.randint(2**62, (), generator=generator, device="cpu")))


def _check_alpha(mixer: MixUp | CutMix) -> None:
    store_as_python(mixer)
    check_number("alpha", mixer.alpha, lambda value: value > 0, "above 0 (write mix=None to switch mixing off)")
