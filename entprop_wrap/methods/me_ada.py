"""ME-ADA (Zhao et al., "Maximum-Entropy Adversarial Data Augmentation", NeurIPS 2020) as a training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.losses import Loss, mean_entropy
from entprop_wrap.functional.uncertainty import num_selected
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.input_gradient import gradient_of
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.utils.features import features_of
from entprop_wrap.utils.modules import evaluating
from entprop_wrap.utils.options import check_integer, check_number, check_text, shown, store_as_python


@dataclass(frozen=True)
class EntropyAscent:
    """How ME-ADA makes an image hard: gradient ascent on loss and entropy, held back in feature space.

    Each image x with label y climbs, from itself,

        J(x) = loss(f(x), y) + eta * H(softmax f(x)) - gamma * mean((z(x) - z(x0))^2)

    by plain steps ``pixel += step_size * dJ/dpixel``: no sign, no momentum, no projection; pixels are clamped to their
    valid range once, after the last step. H is in nats; z is the input of the layer that makes the logits, averaged
    over positions where there are any. The model runs in evaluation mode (no dropout, running statistics), so that an
    image's result depends on no other image, unless batch norms keep no statistics. Where a gradient overflows, as fp16
    may, the pixel stays for that step.

    *Step sizes.* The official code ascends on means over a batch of B images that are normalised with
    a std of s: its ``lr_max`` moves pixels in [0, 1] by ``lr_max / B * s^2`` times the gradient of the image's own J,
    and less in larger batches. Here J is per image and a pixel in [0, 1], whatever the batch and the normalisation:
    ``step_size = lr_max / B * s^2``. The defaults are those of ``run_main_cifar10.sh``: 20 / 128 * 0.5^2; for MNIST
    (``run_main_mnist.sh``) write ``step_size=1/32``.

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
        if self.layer is not None:
            check_text("layer", self.layer)

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
        """Return what ``images`` ``(N, C, H, W)`` in ``space`` become; no parameter gets a gradient, no buffer changes.

        ``forward`` gives logits ``(N, C)`` and calls ``model``, in a container or not, whose training mode is restored.
        ``loss`` is a scalar mean in which every image weighs the same.

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
                scale = 2.0**7  # keeps small gradients from vanishing in fp16; exact elsewhere
                gradient = gradient_of(value * scale, moved)
                moved = moved + step_size * (gradient / scale).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return moved.detach().clamp(lower, upper)


@dataclass(frozen=True)
class MEADA(Method):
    """Clean images through the main norms, maximum-entropy images, made from them, through the auxiliary norms.

    ME-ADA in one step: what the paper adds to the dataset for good, see :func:`grow`, is made anew from every batch,
    and has norms of its own. That is ours, after AdvProp; so are ``weight`` and ``fraction``.

    The ascent runs through the *main* norms: it is the network in use whose uncertainty is to be raised, and clean
    images, where it starts, are what these norms know. It runs in evaluation mode, as in the official code, after the
    main pass. In the first steps of a training from scratch running statistics are far from the data's: start from
    trained weights, or train without for some epochs.

    Cost: ``1 + k (T + 1)`` passes, with k the fraction and T the steps of the ascent: 17 by default.

    Attributes:
        ascent: How images become hard.
        fraction: Share k of the batch that is used for that, in (0, 1], rounded half up and at least 2 images: the
            first rows of the batch, which is shuffled.
        weight: Weight of each grown image, where a clean one has 1; above 0. At 1, the sum is that of one mean over
            their union, in which the paper trains, up to the factor ``1 + k``.
        auxiliary: Name of the auxiliary domain.

    Raises:
        ConfigurationError: An option is out of range.
    """

    ascent: EntropyAscent = EntropyAscent()
    fraction: float = 1.0
    weight: float = 1.0
    auxiliary: str = "aux"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ascent(self.ascent)
        check_number("fraction", self.fraction, lambda value: 0 < value <= 1, "in (0, 1]")
        check_number("weight", self.weight, lambda value: value > 0, "above 0")

    def step(self, step: Step) -> StepOutput:
        """Run the step."""
        logits, main_loss = step.main_pass(step.images, step.labels)
        number = num_selected(len(logits), self.fraction)
        step.warn_if_few(number)
        images, labels = step.images[:number], step.labels[:number]
        with step.only_local():
            images = self.ascent.run(step.model, step.forward, images, labels, loss=step.loss, space=step.space)
        weight = self.weight * number / len(logits)
        aux_logits, aux_loss = step.auxiliary_pass(self.auxiliary, images, labels, weight=weight)
        return step.output(
            loss=main_loss + weight * aux_loss,
            main_loss=main_loss,
            logits=logits,
            passes=1 + number / len(logits) * (self.ascent.steps + 1),
            aux_loss=aux_loss,
            aux_logits=aux_logits,
            aux_images=images,
        )


def check_ascent(ascent: Any) -> None:
    """Raise :class:`ConfigurationError` unless ``ascent`` is an :class:`EntropyAscent`."""
    if not isinstance(ascent, EntropyAscent):
        raise ConfigurationError(f"ascent must be an EntropyAscent(eta=10.0, steps=15, ...), found {shown(ascent)}.")
