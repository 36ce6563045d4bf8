"""Attacks that training methods use: where an image goes, given the gradient of what to increase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError, PixelRangeError
from entprop_wrap.utils.options import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    is_number,
    shown,
    store_as_python,
)
from entprop_wrap.utils.tensors import to_device

__all__ = [
    "PGD",
    "Attack",
    "Gradient",
    "ascend",
    "check_attack",
    "check_magnitude",
    "l2_norm",
    "normalize_l2",
    "uniform_start",
]

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
    ("l2"), then back into the ball. :class:`entprop_wrap.robustness.PGD` is this one with defaults that measure.

    Source: Madry et al., ICLR 2018, section 2.1. The defaults are those of EntProp's AdvProp baseline (section 4.1.3).

    Attributes:
        epsilon: Radius of the ball. For "linf", change of a pixel as a fraction of the pixel range, in (0, 1): 4/255.
            For "l2", length of the change of the whole image in the same unit, above 0: 128/255 is usual at 32 px.
        steps: Number of gradient steps, at least 1.
        step_size: Length of a step, in the same unit; None: ``2.5 * epsilon / steps``, as Madry et al. have it. The
            default is one for "linf". For "l2", all steps together have to cross the ball.
        random_start: Begin at a point drawn uniformly from the ball rather than at the image.
        norm: "linf" or "l2".

    Raises:
        ConfigurationError: An option is out of range.
        PixelRangeError: For "linf", ``epsilon`` or ``step_size`` is not a fraction of the pixel range.
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
        for name in ("epsilon",) if self.step_size is None else ("epsilon", "step_size"):
            if self.norm == "linf":
                check_magnitude(name, getattr(self, name))
            else:
                check_number(name, getattr(self, name), lambda value: value > 0, "above 0")
        if self.norm == "l2" and self.step_size is not None and self.steps * self.step_size < 0.999 * self.epsilon:
            raise ConfigurationError(
                f"{self.steps} steps of {self.step_size:.4g} do not cross a ball of radius {self.epsilon:.4g}. Write "
                "step_size=None for 2.5 * epsilon / steps: the default is one for norm='linf'."
            )

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
        step = size * normalize_l2((gradient * scale).nan_to_num(0.0, 0.0, 0.0))
        change = (images - origin) / scale + step
        change = change * (self.epsilon / l2_norm(change)).clamp(max=1)
        return (origin + change * scale).clamp_(*space.bounds_around(origin))

    def at(self: Ascent, epsilon: float) -> Ascent:
        """Return the same attack at another magnitude; a ``step_size`` that was given stays in proportion."""
        size = None if self.step_size is None else self.step_size * epsilon / self.epsilon
        return replace(self, epsilon=epsilon, step_size=size)


def is_attack(attack: Any) -> TypeGuard[Attack]:
    """Return whether ``attack`` looks like an :class:`Attack`."""
    return not isinstance(attack, type) and hasattr(attack, "run") and hasattr(attack, "steps")


def check_attack(attack: Any) -> None:
    """Raise :class:`ConfigurationError` unless ``attack`` looks like an :class:`Attack`."""
    if not is_attack(attack):
        raise ConfigurationError(f"attack must be an attack such as PGD(epsilon=4/255), found {shown(attack)}.")


def uniform_start(images: Tensor, epsilon: float, space: PixelSpace, generator: torch.Generator | None) -> Tensor:
    """Return a uniformly random point within ``epsilon`` of each image and within valid pixels."""
    noise = _draw(torch.rand, images, generator)
    lower, upper = space.bounds_around(images)
    moved: Tensor = (images + noise.mul_(2).sub_(1) * (epsilon * space.scale(images))).clamp_(lower, upper)
    return moved


def ball_start(images: Tensor, epsilon: float, space: PixelSpace, generator: torch.Generator | None) -> Tensor:
    """Return a uniformly random point within the L2 distance ``epsilon`` of each image, clamped to valid pixels."""
    normal, radius = _draw(torch.randn, images, generator), _draw(torch.rand, images[:, :1, :1, :1], generator)
    # The volume within radius r grows as r^d, so that r is the d-th root of a uniform number.
    change = epsilon * radius ** (1 / images[0].numel()) * normalize_l2(normal)
    return (images + change * space.scale(images)).clamp_(*space.bounds_around(images))


def _draw(function: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return random numbers in the form of ``like``: with a generator from the CPU, so that devices agree."""
    if generator is None:
        return {torch.rand: torch.rand_like, torch.randn: torch.randn_like}[function](like)
    return to_device(function(like.shape, generator=generator, dtype=like.dtype, device="cpu"), like.device)


def normalize_l2(gradient: Tensor) -> Tensor:
    """Return ``gradient`` at length 1 per image, or 0 where it is 0; first scaled, as squares of 1e-30 vanish."""
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    gradient = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / l2_norm(gradient)


def l2_norm(change: Tensor) -> Tensor:
    """Return L2 norms ``(N, 1, 1, 1)``, above 0."""
    norm: Tensor = torch.linalg.vector_norm(change, dim=(1, 2, 3), keepdim=True)
    return norm.clamp_min(torch.finfo(change.dtype).tiny)


def ascend(
    images: Tensor, origin: Tensor, gradient: Tensor, *, epsilon: float, step_size: float, space: PixelSpace
) -> Tensor:
    """Take one signed gradient step from ``images``, and stay within ``epsilon`` of ``origin`` and in valid pixels.

    ``clamp(origin + clip(images - origin + step_size * sign(gradient), -epsilon, epsilon), pixel 0, pixel 1)``. Only
    the sign of the gradient matters, so a loss scaled for fp16 will do; where the gradient is NaN nothing moves. A
    value of ``origin`` outside valid pixels (random erasing, overshoots of interpolation) moves no further out.

    Args:
        images: ``(N, C, H, W)`` in ``space``: where the attack stands.
        origin: ``(N, C, H, W)`` in ``space``: where it began.
        gradient: ``(N, C, H, W)``, of the loss to increase.
        epsilon: Largest change of a pixel, as a fraction of the pixel range (4/255).
        step_size: Change per step, in the same unit.
        space: The space of the images.

    Source: PGD (Madry et al., ICLR 2018, section 2.1), without a random start.
    """
    scale = space.scale(origin)
    signs = gradient.sign().nan_to_num_(nan=0.0)
    reach = epsilon * scale
    moved = (
        signs.mul_(min(step_size, epsilon) * scale)
        if images is origin
        else ((images - origin).add_(signs.mul_(step_size * scale)).clamp_(-reach, reach))
    )
    return moved.add_(origin).clamp_(*space.bounds_around(origin))


def check_magnitude(name: str, value: float) -> None:
    """Raise :class:`PixelRangeError` unless ``value`` is a fraction of the pixel range, above 0 and below 1."""
    if not is_number(value) or not 0 < value < 1:
        hint = f"Write {name}={value:g}/255." if is_number(value) and 1 <= value < 255 else ""
        if isinstance(value, str):
            hint = f"Write {name}=4/255, say, without quotes."
        raise PixelRangeError(
            f"{name} is a fraction of the full pixel range, above 0 and below 1; found {shown(value)}. {hint}".rstrip()
        )
