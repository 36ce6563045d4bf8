"""AutoAttack, through the package ``pyautoattack``: the extra ``attacks``.

It holds the four attacks as the authors have them (https://github.com/fra31/auto-attack). Added here: pixels in any
space, models whatever they return, no gradient left on parameters, and random numbers of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import check_magnitude
from entprop_wrap.robustness.attacks import PixelAttack
from entprop_wrap.robustness.evaluated_model import check_finite, check_labels_fit, logits
from entprop_wrap.utils.options import store_as_python

#: Classes that the targeted attacks of the standard version aim at, or all others of a model with fewer.
_TARGETS = 9
#: The targeted loss divides by a difference that reaches to the fourth largest logit.
_FEWEST_CLASSES = 4


@dataclass(frozen=True)
class AutoAttack(PixelAttack):
    """The standard version: APGD on cross-entropy, APGD on the targeted DLR loss, targeted FAB, then Square.

    Each attack is tried on the images that the ones before have left right. It is slow: an image that holds out costs
    1,900 passes and 5,000 forward passes, so a few hundred images are usual. It needs at least 4 classes. What is
    drawn depends on how images are batched. The package warns, by the logger "auto-attack", where the accuracy may be
    too high.

    Attributes:
        epsilon: Largest change of a pixel, as a fraction of the pixel range, in (0, 1): 4/255.

    Raises:
        ImportError: ``pyautoattack`` is not installed: ``pip install entprop-wrap[attacks]``.

    Source: Croce & Hein (ICML 2020).
    """

    epsilon: float = 4 / 255

    def __post_init__(self) -> None:
        store_as_python(self)
        check_magnitude("epsilon", self.epsilon)
        _package()  # what is missing is to be known before hours of evaluation, not after

    def attack_pixels(
        self, model: nn.Module, pixels: Tensor, labels: Tensor, space: PixelSpace, generator: torch.Generator | None
    ) -> Tensor:
        """Return attacked pixels."""
        pixels = pixels.float()
        with torch.no_grad():
            clean = logits(model, space.to_images(pixels))
        check_finite(clean, "The model under attack")
        classes = clean.shape[1]
        if classes < _FEWEST_CLASSES:
            raise ConfigurationError(
                f"AutoAttack needs at least {_FEWEST_CLASSES} classes, found {classes}. Write PGD()."
            )
        check_labels_fit(labels, classes, "The model")

        def new_logits(pixels: Tensor) -> Tensor:
            if not len(pixels):  # Square asks for none where an image lies exactly on the boundary
                return pixels.new_zeros(0, classes)
            # A copy, as parts of the package write into what they are given.
            return logits(model, space.to_images(pixels)).to(torch.float32, copy=True)

        attack = _package()(
            new_logits,
            norm="Linf",
            eps=self.epsilon,
            seed=int(torch.randint(2**31, (), generator=generator)),
            device=pixels.device,
        )
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(_TARGETS, classes - 1)
        with _undisturbed(model, pixels.device):
            found: Tensor = attack.run_standard_evaluation(pixels, labels, batch_size=len(pixels))[0]
        return found

    def at(self, epsilon: float) -> AutoAttack:
        """Return the same attack at another magnitude."""
        return replace(self, epsilon=epsilon)


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Give parameters no gradient, and put back what the package sets for the process: random numbers, and a tracer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tracer = sys.gettrace()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else ()):
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            sys.settrace(tracer)


def _package() -> Any:
    try:
        from pyautoattack import AutoAttack as Found
    except ImportError as error:
        raise ImportError("AutoAttack needs pyautoattack: pip install entprop-wrap[attacks].") from error
    return Found
