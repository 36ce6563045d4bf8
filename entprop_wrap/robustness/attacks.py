"""Adversarial attacks, to measure accuracy under them: FGSM and PGD in two norms, on a model or by way of another.

An attack is called ``attack(model, images, labels, pixel_space, generator)`` and returns images; a function of your
own, around another library, serves as well. Magnitudes are fractions of the pixel range, whatever the images are
normalised with, and attacked pixels stay valid. The model is attacked as it is evaluated: in evaluation mode, with no
gradient left on its parameters.

High accuracy under one attack does not prove robustness: look at several, at large epsilons, where accuracy must fall
to 0, and at attacks by way of another model (Carlini et al. 2019, "On evaluating adversarial robustness",
https://arxiv.org/abs/1902.06705). EntProp itself is not a defence: its accuracy under PGD is near that of vanilla
training (its table 11).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.data.validation import check_evaluated
from entprop_wrap.errors import ConfigurationError, UnsupportedModelError
from entprop_wrap.functional import attacks
from entprop_wrap.functional.attacks import Gradient, normalize_l2
from entprop_wrap.robustness.corruptions.random import Draws
from entprop_wrap.robustness.distributed import Batch
from entprop_wrap.robustness.evaluated_model import (
    check_evaluation_mode,
    check_finite,
    check_labels_fit,
    device_of,
    logits,
)
from entprop_wrap.utils.modules import check_module
from entprop_wrap.utils.options import check_generator, shown
from entprop_wrap.utils.tensors import refuse_inference_mode

#: ``(model, images, labels, pixel_space, generator) -> images``
AttackFunction: TypeAlias = Callable[[nn.Module, Tensor, Tensor, PixelSpace, "torch.Generator | None"], Tensor]

_PIXELS = PixelSpace()


class PixelAttack:
    """An attack on pixels in [0, 1]: subclasses define :meth:`attack_pixels`."""

    #: The model that is attacked instead of the one under evaluation.
    source: nn.Module | None = None

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        pixel_space: PixelSpace | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return attacked images of the same shape, at least float32, on the device of the model.

        Args:
            model: In evaluation mode, with parameters of at least 32 bits (or bfloat16).
            images: ``(N, C, H, W)`` in ``pixel_space``.
            labels: ``(N,)`` class indices.
            pixel_space: What images are normalised with; None: nothing.
            generator: CPU generator of the random starts; None: torch's default. What is drawn for an image does not
                depend on the batch size or the device.

        Raises:
            ConfigurationError: The model is in training mode, or ``pixel_space`` is not a PixelSpace.
            ImageError: Images of a wrong type or shape, or not finite.
            PixelRangeError: Images that do not lie in ``pixel_space``.
            LabelError: Labels of a wrong type or shape, or that do not fit the model.
            ModelOutputError: The model's logits are NaN or infinite.
            UnsupportedModelError: The model is float16, in which gradients vanish, or gives no gradient.
        """
        model = model if self.source is None else self.source
        check_module("The model", model)
        check_evaluation_mode(model, "The model")
        if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
            raise UnsupportedModelError(
                "The model is float16, in which small gradients vanish and an attack looks weaker than it is. Write "
                "model.float(), with torch.autocast for speed."
            )
        check_generator(generator)
        space = space_of(pixel_space)
        labels = check_evaluated(images, labels, space)
        pixels = space.to_pixels(images.detach().to(device_of(model, images)))
        found = self.attack_pixels(model, pixels, labels.to(pixels.device), space, generator)
        return space.to_images(found).to(torch.promote_types(images.dtype, torch.float32))  # half would leave the ball

    def attack_pixels(
        self, model: nn.Module, pixels: Tensor, labels: Tensor, space: PixelSpace, generator: torch.Generator | None
    ) -> Tensor:
        """Return attacked pixels ``(N, C, H, W)``, at least float32, on the device of the model."""
        raise NotImplementedError


@dataclass(frozen=True)
class PGD(PixelAttack, attacks.PGD):
    """Projected gradient ascent on the loss, within a ball around the image and within valid pixels.

    It is :class:`entprop_wrap.functional.attacks.PGD`, which methods train with and which has the other options, on the
    cross-entropy. The last iterate counts.

    Attributes:
        source: A model that is attacked instead of the one under evaluation, in evaluation mode; better one that
            was trained on its own. A model that only hides its gradients falls to images made for another, ordinary
            one (Papernot et al. 2017, "Practical black-box attacks against machine learning").

    Source: Madry et al. (ICLR 2018), section 2.1.
    """

    steps: int = 20
    step_size: float | None = None
    source: nn.Module | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is not None:
            check_module("source", self.source)

    def run(self, images: Tensor, gradient: Gradient, space: PixelSpace, generator: torch.Generator | None) -> Tensor:
        """Return the attacked images of a training method, which says what to increase.

        Raises:
            ConfigurationError: ``source`` is set, which has no effect there.
        """
        if self.source is not None:
            raise ConfigurationError("A training method attacks the model that it trains: leave out source.")
        return super().run(images, gradient, space, generator)

    def attack_pixels(
        self, model: nn.Module, pixels: Tensor, labels: Tensor, space: PixelSpace, generator: torch.Generator | None
    ) -> Tensor:
        """Return attacked pixels."""
        origin, draws = pixels, Draws(pixels, generator)
        if self.random_start:
            pixels = self._start(origin, draws)
        for step in range(self.steps):
            gradient = _pixel_gradient(model, pixels, labels, space, first=step == 0)
            pixels = self.ascend(pixels, origin, gradient, _PIXELS)
        return pixels

    def _start(self, origin: Tensor, draws: Draws) -> Tensor:
        if self.norm == "linf":
            return (origin + draws.uniform(origin.shape[1:], -self.epsilon, self.epsilon)).clamp_(0, 1)
        drawn = draws.normal(origin.shape[1:])
        # The volume within radius r grows as r^d, so that r is the d-th root of a uniform number.
        radius = draws.uniform((1, 1, 1)) ** (1 / origin[0].numel())
        return (origin + self.epsilon * radius * normalize_l2(drawn)).clamp_(0, 1)


@dataclass(frozen=True)
class FGSM(PGD):
    """One step of full size along the sign of the gradient of the cross-entropy, from the image itself.

    It is :class:`PGD` with other defaults. Source: Goodfellow et al. (ICLR 2015), section 4.
    """

    steps: int = 1
    random_start: bool = False


def _pixel_gradient(model: nn.Module, pixels: Tensor, labels: Tensor, space: PixelSpace, *, first: bool) -> Tensor:
    """Return the gradient of each image's cross-entropy with respect to its pixels, up to a positive factor per image.

    No parameter gets any gradient. Attacks use signs and directions only, so the factor is free, and it is needed: the
    gradient of a confident prediction is exactly 0 in float32, and the attack would stand still. So the slope at the
    logits is taken in float64, and scaled to 1 before it goes back through the model.
    """
    refuse_inference_mode()
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        found = logits(model, space.to_images(pixels))
        if first:  # as this waits for the device
            check_labels_fit(labels, found.shape[1], "The model")
        check_finite(found, "The model under attack")
        if not found.requires_grad:
            raise UnsupportedModelError(
                "The logits have no gradient: the model runs under torch.no_grad() inside. Attack it by way of "
                "another model: PGD(source=...)."
            )
        widest = torch.float32 if found.device.type == "mps" else torch.float64  # MPS has no other
        values = found.detach().to(widest).requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(values, labels, reduction="sum"), values)
        slope = slope / slope.abs().amax(1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        (gradient,) = torch.autograd.grad(found, pixels, slope.to(found.dtype))
    return gradient


def attacked(
    name: str,
    attack: AttackFunction,
    model: nn.Module,
    batch: Batch,
    space: PixelSpace,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the images that an attack, which may be anybody's function and is called ``name``, makes of a batch."""
    found: Any = attack(model, batch.images.clone(), batch.labels, space, generator)  # which it may change
    shape = tuple(batch.images.shape)
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigurationError(f"{name} must return images of shape {shape}; it returned {what}.")
    check_evaluated(found, batch.labels, space)
    return found


def check_attack(name: str, attack: Any) -> Any:
    """Return an attack, made from one for training where need be; ``name`` is what messages call it."""
    if isinstance(attack, attacks.PGD) and not isinstance(attack, PGD):
        return PGD(**{field.name: getattr(attack, field.name) for field in fields(attack)})
    if isinstance(attack, (type, nn.Module)) or not callable(attack):
        found = f"the model {type(attack).__name__}" if isinstance(attack, nn.Module) else shown(attack)
        raise ConfigurationError(
            f"{name} must be an attack such as PGD(), or a function (model, images, labels, pixel_space, generator) -> "
            f"images; found {found}."
        )
    return attack
