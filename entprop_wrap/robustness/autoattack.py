"""AutoAttack, through the authors' code as the package ``pyautoattack`` has it: the extra ``attacks``.

The package takes the four attacks as they are in the repository of the authors (https://github.com/fra31/auto-attack)
and makes them installable. What is added here is what an evaluation needs around them: pixels in any space, models
whatever they return, no gradient left on parameters, and the random numbers of everybody else left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import check_magnitude
from entprop_wrap.robustness.ascent import check_attackable
from entprop_wrap.robustness.evaluated_model import check_finite, check_labels_fit, device_of, logits
from entprop_wrap.robustness.pixels import check_batch, space_of, to_images, to_pixels
from entprop_wrap.utils.options import check_choice, check_generator, check_number, store_as_python

__all__ = ["AutoAttack"]

#: Classes that the targeted attacks of the standard version are aimed at, where the model has as many others.
_TARGETS = 9
#: The targeted loss divides by a difference that reaches to the fourth largest logit.
_FEWEST_CLASSES = 4


@dataclass(frozen=True)
class AutoAttack:
    """The standard version: APGD on cross-entropy, APGD on the targeted DLR loss, targeted FAB, then Square.

    Each attack is tried on the images that the ones before have left right, so accuracy is that under the strongest of
    them for each image; there is nothing to tune. It is slow: an image that holds out costs 100 passes for APGD, 900
    each for targeted APGD and FAB, and 5000 forward passes for Square. A few hundred images are usual.

    The package warns, by the logger "auto-attack", where a model is randomised, or has zero gradients, or where Square
    finds what gradients did not: then the accuracy may be too high. What is drawn depends on how images are batched.

    Attributes:
        epsilon: Radius of the ball. For "linf", change of a pixel as a fraction of the pixel range, in (0, 1): 4/255.
            For "l2", length of the change of the whole image in the same unit, above 0.
        norm: "linf" or "l2".

    Raises:
        ImportError: ``pyautoattack`` is not installed: ``pip install entprop-wrap[attacks]``.

    Source: Croce & Hein (ICML 2020), "Reliable evaluation of adversarial robustness with an ensemble of diverse
        parameter-free attacks".
    """

    epsilon: float = 4 / 255
    norm: Literal["linf", "l2"] = "linf"

    def __post_init__(self) -> None:
        store_as_python(self)
        check_choice("norm", self.norm, ("linf", "l2"))
        if self.norm == "linf":
            check_magnitude("epsilon", self.epsilon)
        else:
            check_number("epsilon", self.epsilon, lambda value: value > 0, "above 0")
        _package()  # what is missing is to be known before hours of evaluation, not after

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        pixel_space: PixelSpace | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return attacked images; those that no attack has changed the prediction of stay as they are.

        Args:
            model: In evaluation mode, with at least 4 logits, and parameters of at least 32 bits (or bfloat16).
            images: ``(N, C, H, W)`` in ``pixel_space``.
            labels: ``(N,)`` class indices.
            pixel_space: What images are normalised with; None: nothing.
            generator: CPU generator of one seed for this batch, None for torch's default.

        Returns:
            Images of the same shape and dtype, on the device of the model.

        Raises:
            ConfigurationError: The model is in training mode, or has fewer than 4 classes.
            ImageError, PixelRangeError: Images of a wrong type or shape, not finite, or out of ``pixel_space``.
            LabelError: Labels of a wrong type or shape, or that do not fit the model.
            ModelOutputError: The model's logits are NaN or infinite.
            UnsupportedModelError: The model is float16, in which gradients vanish.
        """
        check_attackable(model)
        check_generator(generator)
        space = space_of(pixel_space)
        labels = check_batch(images, labels, space)
        device = device_of(model, images)
        pixels, labels = to_pixels(images.detach().to(device), space).float(), labels.to(device)
        with torch.no_grad():
            clean = logits(model, to_images(pixels, space))
        check_finite(clean, "The model under attack")
        classes = clean.shape[1]
        if classes < _FEWEST_CLASSES:
            raise ConfigurationError(
                f"AutoAttack's targeted loss needs at least {_FEWEST_CLASSES} classes, the model has {classes}. Write "
                "PGD(loss='margin', restarts=5) instead."
            )
        check_labels_fit(labels, classes, "The model")
        seed = int(torch.randint(2**31, (), generator=generator))
        attack = _package()(
            _Logits(model, space, classes),
            norm={"linf": "Linf", "l2": "L2"}[self.norm],
            eps=self.epsilon,
            seed=seed,
            device=device,
        )
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(_TARGETS, classes - 1)
        with _undisturbed(device):
            found, _ = attack.run_standard_evaluation(pixels, labels, batch_size=len(pixels))
        return to_images(found, space).to(images.dtype)

    def at(self, epsilon: float) -> AutoAttack:
        """Return the same attack at another magnitude."""
        return replace(self, epsilon=epsilon)


class _Logits:
    """Logits of pixels, float32, in a new tensor: parts of the package write into what they are given.

    A function rather than a module, as the package only calls it.
    """

    def __init__(self, model: nn.Module, space: PixelSpace, classes: int) -> None:
        self.model, self.space, self.classes = model, space, classes

    def __call__(self, pixels: Tensor) -> Tensor:
        if not len(pixels):  # Square asks for none where an image lies exactly on the boundary
            return pixels.new_zeros(0, self.classes)
        if torch.is_grad_enabled() and pixels.requires_grad:
            found: Tensor = _WithoutParameters.apply(pixels, self._found)
            return found.clone()
        with torch.no_grad():
            return self._found(pixels)

    def _found(self, pixels: Tensor) -> Tensor:
        return logits(self.model, to_images(pixels, self.space)).to(torch.float32, copy=True)


class _WithoutParameters(torch.autograd.Function):
    """Differentiate a function of pixels with respect to them alone: ``backward()`` by FAB would fill parameters."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.pixels = pixels.detach().requires_grad_()
            ctx.found = function(ctx.pixels)
        found: Tensor = ctx.found.detach()
        return found

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (gradient,) = torch.autograd.grad(ctx.found, ctx.pixels, slope)
        return gradient, None


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Put back what the package sets for the whole process: random numbers, and the tracer of a debugger."""
    tracer = sys.gettrace()
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            sys.settrace(tracer)


def _package() -> Any:
    try:
        from pyautoattack import AutoAttack as Found
    except ImportError as error:
        raise ImportError(
            "AutoAttack needs the package pyautoattack, which is not installed. Write: "
            "pip install entprop-wrap[attacks]"
        ) from error
    return Found
