"""Attacks that training methods use: where an image goes, given the gradient of what to increase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.perturbation import PixelSpace, ascend, check_magnitude

__all__ = ["PGD", "Attack", "Gradient", "check_attack", "uniform_start"]

#: ``images (N, C, H, W) -> gradient`` of the objective to increase, up to a positive factor.
Gradient = Callable[[Tensor], Tensor]


class Attack(Protocol):
    """Moves images so that an objective grows. ``steps`` is the number of gradients it takes."""

    @property
    def steps(self) -> int: ...  # noqa: D102

    def run(self, images: Tensor, gradient: Gradient, space: PixelSpace, generator: torch.Generator | None) -> Tensor:
        """Return images ``(N, C, H, W)`` in ``space``; the input is not changed."""
        ...


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent on the sign of the gradient, within an L-infinity ball and valid pixels.

    Source: Madry et al., ICLR 2018, section 2.1. The defaults are those of EntProp's AdvProp baseline (section 4.1.3).

    Attributes:
        epsilon: Radius of the ball, as a fraction of the pixel range.
        steps: Number of gradient steps, at least 1.
        step_size: Change per step, as a fraction of the pixel range.
        random_start: Begin at a uniformly random point of the ball rather than at the image.
    """

    epsilon: float = 4 / 255
    steps: int = 5
    step_size: float = 1 / 255
    random_start: bool = True

    def __post_init__(self) -> None:
        check_magnitude("epsilon", self.epsilon)
        check_magnitude("step_size", self.step_size)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigurationError(f"steps must be an integer of at least 1, found {self.steps!r}.")

    def run(self, images: Tensor, gradient: Gradient, space: PixelSpace, generator: torch.Generator | None) -> Tensor:
        """Return the attacked images."""
        moved = uniform_start(images, self.epsilon, space, generator) if self.random_start else images
        for _ in range(self.steps):
            moved = ascend(moved, images, gradient(moved), epsilon=self.epsilon, step_size=self.step_size, space=space)
        return moved


def check_attack(attack: Any) -> None:
    """Raise :class:`ConfigurationError` unless ``attack`` looks like an :class:`Attack`."""
    if isinstance(attack, type) or not (hasattr(attack, "run") and hasattr(attack, "steps")):
        raise ConfigurationError(f"attack must be an attack such as PGD(epsilon=4/255), found {attack!r}.")


def uniform_start(images: Tensor, epsilon: float, space: PixelSpace, generator: torch.Generator | None) -> Tensor:
    """Return a uniformly random point within ``epsilon`` of each image and within valid pixels."""
    if generator is None:
        noise = torch.rand_like(images)
    else:  # drawn on the CPU, so that every device gives the same
        noise = torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    lower, upper = space.bounds(images)
    moved: Tensor = (images + noise.mul_(2).sub_(1) * (epsilon * space.scale(images))).clamp_(lower, upper)
    return moved
