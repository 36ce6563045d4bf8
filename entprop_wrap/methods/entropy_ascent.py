"""The ascent of ME-ADA (Zhao et al., NeurIPS 2020): how an image becomes hard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError, UnsupportedModelError
from entprop_wrap.functional.losses import Loss, mean_entropy
from entprop_wrap.utils.features import features_of
from entprop_wrap.utils.modules import walk
from entprop_wrap.utils.options import check_integer, check_number, shown, store_as_python

__all__ = ["EntropyAscent", "check_ascent"]


@dataclass(frozen=True)
class EntropyAscent:
    """How ME-ADA makes an image hard: gradient ascent on loss and entropy, held back in feature space.

    Each image x with label y climbs, from itself,

        J(x) = loss(f(x), y) + eta * H(softmax f(x)) - gamma * mean((z(x) - z(x0))^2)

    by plain steps ``pixel += step_size * dJ/dpixel``: no sign, no momentum, no projection; pixels are clamped to their
    valid range once, after the last step. H is in nats; z is the input of the layer that makes the logits, averaged
    over positions where there are any. The model runs in evaluation mode (running statistics, no dropout), so that an
    image's result depends on no other image. Where a gradient overflows, as fp16 may, the pixel stays for that step.

    *Step sizes.* The official code (garyzhao/ME-ADA) ascends on means over a batch of B images that are normalised with
    a std of s: its ``lr_max`` moves pixels in [0, 1] by ``lr_max / B * s^2`` times the gradient of the image's own J,
    and less in larger batches. Here J is per image and a pixel in [0, 1], whatever the batch and the normalisation:
    ``step_size = lr_max / B * s^2``. CIFAR: 20 / 128 * 0.5^2; MNIST: 1 / 32, in [0, 1] already.

    Attributes:
        eta: Weight of the entropy, at least 0; 0 is ADA (Volpi et al., NeurIPS 2018). Called beta in the paper.
        gamma: Weight of the distance in feature space, at least 0.
        steps: Gradient steps (T_max), at least 1; each costs a pass.
        step_size: In pixels, as a fraction of the pixel range, per unit of dJ/dpixel; above 0.
        layer: Name of another layer whose input is z; None: the classifier's head, see ``features_of``.

    Raises:
        ConfigurationError: An option is out of range.
    """

    eta: float = 10.0
    gamma: float = 1.0
    steps: int = 15
    step_size: float = 20 / 128 * 0.5**2
    layer: str | None = None

    def __post_init__(self) -> None:
        store_as_python(self)
        check_number("eta", self.eta, lambda value: value >= 0, "at least 0")
        check_number("gamma", self.gamma, lambda value: value >= 0, "at least 0")
        check_number("step_size", self.step_size, lambda value: value > 0, "above 0")
        check_integer("steps", self.steps, 1)
        if self.layer is not None and not isinstance(self.layer, str):
            raise ConfigurationError(f"layer must be the name of a layer, or None; found {shown(self.layer)}.")

    @classmethod
    def cifar(cls, **options: Any) -> EntropyAscent:
        """Return the settings of ``run_main_cifar10.sh`` in the official code, which are the defaults."""
        return cls(**options)

    @classmethod
    def mnist(cls, **options: Any) -> EntropyAscent:
        """Return the settings of ``run_main_mnist.sh`` in the official code."""
        return cls(**{"step_size": 1 / 32, **options})

    def run(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        *,
        loss: Loss,
        space: PixelSpace,
    ) -> Tensor:
        """Return what ``images`` become; no parameter gets a gradient, and no buffer changes.

        Args:
            model: What ``forward`` calls, in a container or not; its training mode is restored.
            forward: ``images -> logits (N, C)``.
            images: ``(N, C, H, W)`` in ``space``; not modified.
            labels: ``(N,)`` class indices or ``(N, C)`` probabilities.
            loss: ``(logits, labels) -> scalar mean`` in which every image weighs the same.
            space: Pixel space of the images.

        Raises:
            ModelOutputError: No layer makes the logits, see ``features_of``.
            UnsupportedModelError: The model uses reentrant checkpointing in evaluation mode.
        """
        lower, upper = space.bounds_around(images)
        step_size = self.step_size * space.scale(images) ** 2  # of gradients with respect to normalised images
        moved, origin = images.detach(), None
        with evaluating(model), features_of(model, layer=self.layer) if self.gamma else nullcontext() as features:
            for _ in range(self.steps):
                moved = moved.detach().requires_grad_()
                logits = forward(moved)
                value = len(images) * (loss(logits, labels) + self.eta * mean_entropy(logits))
                if features is not None:
                    z = features.last if features.last.dtype == torch.float64 else features.last.float()
                    origin = z.detach() if origin is None else origin  # the first pass is at the image itself
                    value = value - self.gamma * (z - origin).square().mean(dim=1).sum()
                moved = moved + step_size * pixel_gradient(value, moved)
        return moved.detach().clamp(lower, upper)


def pixel_gradient(value: Tensor, images: Tensor) -> Tensor:
    """Return the gradient of the scalar ``value`` with respect to ``images``, 0 where it is not finite.

    Raises:
        UnsupportedModelError: Reentrant checkpointing, which torch cannot differentiate this way.
    """
    scale = 2.0**7  # keeps small gradients from vanishing in fp16; exact elsewhere
    try:
        (gradient,) = torch.autograd.grad(value * scale, images)
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
        raise UnsupportedModelError(
            "The ascent of ME-ADA needs the gradient of the images alone, which reentrant activation checkpointing "
            "cannot give. Write use_reentrant=False."
        ) from error
    return (gradient / scale).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have all modules in evaluation mode inside the with-block, and as they were afterwards."""
    training = [module for module in walk(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_ascent(ascent: Any) -> None:
    """Raise :class:`ConfigurationError` unless ``ascent`` is an :class:`EntropyAscent`."""
    if not isinstance(ascent, EntropyAscent):
        raise ConfigurationError(f"ascent must be an EntropyAscent(eta=10.0, steps=15, ...), found {shown(ascent)}.")
