"""Attacks that training methods use: where an image goes, given the gradient of what to increase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.mixing import sent
from entprop_wrap.perturbation import PixelSpace, ascend, check_magnitude
from entprop_wrap.utils.options import check_choice, check_flag, check_integer, check_number, shown, store_as_python

__all__ = ["PGD", "Attack", "Gradient", "check_attack", "direction", "length", "uniform_start"]

Ascent = TypeVar("Ascent", bound="PGD")

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
    """Projected gradient ascent, within a ball around the image and within valid pixels.

    Each step moves by ``step_size`` along the sign of the gradient ("linf") or along the gradient scaled to length 1
    ("l2"), then back into the ball. To measure robustness there is a stronger one, with restarts, which is this one
    too: :class:`entprop_wrap.robustness.PGD`.

    Source: Madry et al., ICLR 2018, section 2.1. The defaults are those of EntProp's AdvProp baseline (section 4.1.3).

    Attributes:
        epsilon: Radius of the ball. For "linf", change of a pixel as a fraction of the pixel range, in (0, 1): 4/255.
            For "l2", length of the change of the whole image in the same unit, above 0: 128/255 is usual at 32 px.
        steps: Number of gradient steps, at least 1.
        step_size: Length of a step, likewise; None: ``2.5 * epsilon / steps``, as Madry et al. have it.
        random_start: Begin at a point drawn uniformly from the ball rather than at the image.
        norm: "linf" or "l2".

    Raises:
        ConfigurationError: An option is out of range.
        PixelRangeError: For "linf", ``epsilon`` or ``step_size`` is no fraction of the pixel range.
    """

    epsilon: float = 4 / 255
    steps: int = 5
    step_size: float | None = 1 / 255
    random_start: bool = True
    norm: Literal["linf", "l2"] = "linf"

    def __post_init__(self) -> None:
        store_as_python(self)
        check_choice("norm", self.norm, ("linf", "l2"))
        check_integer("steps", self.steps, 1)
        check_flag("random_start", self.random_start)
        for name in ("epsilon", "step_size"):
            value = getattr(self, name)
            if name == "step_size" and value is None:
                continue
            if self.norm == "linf":
                check_magnitude(name, value)
            else:
                check_number(name, value, lambda value: value > 0, "above 0")

    def run(self, images: Tensor, gradient: Gradient, space: PixelSpace, generator: torch.Generator | None) -> Tensor:
        """Return the attacked images."""
        start = uniform_start if self.norm == "linf" else ball_start
        moved = start(images, self.epsilon, space, generator) if self.random_start else images
        for _ in range(self.steps):
            moved = self.ascend(moved, images, gradient(moved), space)
        return moved

    def ascend(self, images: Tensor, origin: Tensor, gradient: Tensor, space: PixelSpace) -> Tensor:
        """Take one step from ``images``, within the ball around ``origin``; all ``(N, C, H, W)`` in ``space``.

        Where the gradient is not finite, nothing moves.
        """
        size = 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size
        if self.norm == "linf":
            return ascend(images, origin, gradient, epsilon=self.epsilon, step_size=size, space=space)
        scale = space.scale(origin)
        # Lengths are those of pixels: a gradient for normalised images is one for pixels, divided by the scale.
        step = size * direction((gradient * scale).nan_to_num(0.0, 0.0, 0.0))
        change = (images - origin) / scale + step
        change = change * (self.epsilon / length(change)).clamp(max=1)
        return (origin + change * scale).clamp_(*space.bounds_around(origin))

    def at(self: Ascent, epsilon: float) -> Ascent:
        """Return the same attack at another magnitude; a ``step_size`` that was given stays in proportion."""
        size = None if self.step_size is None else self.step_size * epsilon / self.epsilon
        return replace(self, epsilon=epsilon, step_size=size)


def check_attack(attack: Any) -> None:
    """Raise :class:`ConfigurationError` unless ``attack`` looks like an :class:`Attack`."""
    if isinstance(attack, type) or not (hasattr(attack, "run") and hasattr(attack, "steps")):
        raise ConfigurationError(f"attack must be an attack such as PGD(epsilon=4/255), found {shown(attack)}.")


def uniform_start(images: Tensor, epsilon: float, space: PixelSpace, generator: torch.Generator | None) -> Tensor:
    """Return a uniformly random point within ``epsilon`` of each image and within valid pixels."""
    if generator is None:
        noise = torch.rand_like(images)
    else:  # drawn on the CPU, so that every device gives the same
        noise = sent(torch.rand(images.shape, generator=generator, dtype=images.dtype), images.device)
    lower, upper = space.bounds_around(images)
    moved: Tensor = (images + noise.mul_(2).sub_(1) * (epsilon * space.scale(images))).clamp_(lower, upper)
    return moved


def ball_start(images: Tensor, epsilon: float, space: PixelSpace, generator: torch.Generator | None) -> Tensor:
    """Return a uniformly random point within the L2 distance ``epsilon`` of each image, clamped to valid pixels."""
    if generator is None:
        normal, radius = torch.randn_like(images), torch.rand_like(images[:, :1, :1, :1])
    else:
        normal, radius = (
            sent(draw, images.device)
            for draw in (
                torch.randn(images.shape, generator=generator, dtype=images.dtype),
                torch.rand((len(images), 1, 1, 1), generator=generator, dtype=images.dtype),
            )
        )
    # The volume within radius r grows as r^d, so that r is the d-th root of a uniform number.
    change = epsilon * radius ** (1 / images[0].numel()) * direction(normal)
    return (images + change * space.scale(images)).clamp_(*space.bounds_around(images))


def direction(gradient: Tensor) -> Tensor:
    """Return ``gradient`` at length 1 per image, or 0 where it is 0; first scaled, as squares of 1e-30 vanish."""
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    gradient = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / length(gradient)


def length(change: Tensor) -> Tensor:
    """Return L2 norms ``(N, 1, 1, 1)``, above 0."""
    norm: Tensor = torch.linalg.vector_norm(change, dim=(1, 2, 3), keepdim=True)
    return norm.clamp_min(torch.finfo(change.dtype).tiny)
