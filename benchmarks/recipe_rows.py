"""The rows of benchmarks/recipes.py: ways to train, some with other changes than a step along the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap import EntProp
from entprop_wrap.functional import uncertainty
from entprop_wrap.functional.attacks import ascend
from entprop_wrap.functional.targets import Target
from entprop_wrap.functional.uncertainty import entropy, num_selected, top_k
from entprop_wrap.methods import FastAdvProp, Method, Vanilla
from entprop_wrap.methods.views import Augmentation, EachImage, augmented


@dataclass(frozen=True)
class Row:
    """A way to train: a method (of epsilon), the copies of the norms it runs with, and a share of the epochs.

    Attributes:
        first: Method of the first 30 % of the steps, instead.
        last: Method of the last 30 %.
        average: Decay per step of a moving average of the weights, which is evaluated instead.
        twice: Augment all images once more, with TrivialAugment.
        head_first: Fit the head on the pretrained features first (``finetuning.linear_probe``).
        halfway_of: Not trained: half-way between the fitted head and another row, which has been trained before it.
        recalibrate: Estimate the main statistics anew after training, on images hardened by a signed gradient step.
    """

    method: Callable[[float | None], Any]
    copies: str = "all"
    epochs: float = 1.0
    first: Callable[[float | None], Any] | None = None
    last: Callable[[float | None], Any] | None = None
    average: float | None = None
    twice: bool = False
    recalibrate: bool = False
    head_first: bool = False
    halfway_of: str | None = None


@dataclass(frozen=True)
class Consistent(Method):
    """Cross-entropy of another view of the most uncertain images, and its divergence from the first view's prediction.

    The Jensen-Shannon divergence of AugMix (Hendrycks et al., ICLR 2020), between the domains.
    """

    view: Augmentation | None = None
    epsilon: float | None = None
    fraction: float = 0.2
    weight: float = 12.0
    random: bool = False
    auxiliary: str | None = "aux"

    def step(self, step):  # noqa: D102
        images = step.images.clone().requires_grad_(self.view is None)
        with step.only_local():
            logits = step.forward(images)
            main_loss = step.loss(logits, step.labels)
            step.backward(main_loss)
        logits = logits.detach()
        score = torch.rand(len(logits), generator=step.generator) if self.random else entropy(logits)
        selected = top_k(score, num_selected(len(logits), self.fraction))
        target, number = Target(step.labels).rows(selected), len(selected)
        views = images.detach()[selected]
        if self.view is not None:
            views = augmented(step, views, self.view, "of the row")
        gradient = None
        if self.epsilon is not None and self.view is None:
            gradient = images.grad[selected]
        elif self.epsilon is not None:
            with step.auxiliary(self.auxiliary, record_statistics=False):
                gradient = step.pixel_gradient(views, target)
        if gradient is not None:
            views = ascend(views, views, gradient, epsilon=self.epsilon, step_size=self.epsilon, space=step.space)
        with step.auxiliary(self.auxiliary):
            aux_logits = step.forward(views)
            shares = [part.softmax(1).clamp(1e-7, 1) for part in (logits[selected], aux_logits)]
            middle = (sum(shares) / 2).log()
            divergence = sum(F.kl_div(middle, share, reduction="batchmean") for share in shares) / 2
            aux_loss = target.loss(step.loss, aux_logits)
            step.backward(number / len(logits) * (aux_loss + self.weight * divergence))
        return step.output(logits=logits, main_loss=main_loss, passes=1 + self.fraction, selected=selected)


def gaussian(pixels: Tensor) -> Tensor:
    """Add noise of a standard deviation drawn from [0, 0.2] for each image."""
    return pixels + 0.2 * torch.rand(len(pixels), 1, 1, 1) * torch.randn(pixels.shape)


def fourier(pixels: Tensor) -> Tensor:
    """Add one plane wave to each channel, of exponential amplitude, mean 0.1, after AFA (Vaish et al., CVPR 2024)."""
    number, channels, height, width = pixels.shape

    def draw() -> Tensor:
        return torch.rand(number, channels, 1, 1)

    amplitude = -0.1 * (1 - draw()).log()
    frequency, angle, phase = height * draw() / 2, math.pi * draw(), 2 * math.pi * draw()
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width)[None] / width
    return pixels + amplitude * torch.sin(
        2 * math.pi * frequency * (rows * torch.cos(angle) + columns * torch.sin(angle)) + phase
    )


def unmixed(**options: Any) -> Callable[[float | None], EntProp]:
    """Return EntProp without mixing, of the regime's epsilon, with options."""
    return lambda epsilon: EntProp(**{"epsilon": epsilon, "mix": None, **options})


def changed(view: str | Augmentation) -> Row:
    """Return EntProp without mixing, with another change of the selected images than a gradient step."""
    return Row(lambda epsilon: EntProp.augmented(view=view), "statistics")


def scaled(factor: float) -> Row:
    """Return EntProp without mixing with another epsilon."""
    return Row(lambda epsilon: EntProp(mix=None, epsilon=factor * (epsilon or 1 / 255)), "statistics")


TRIVIAL_AUGMENT = EachImage("trivialaugment")

ROWS = {
    "vanilla": Row(lambda epsilon: Vanilla()),
    "vanilla, 1.3 x": Row(lambda epsilon: Vanilla(), epochs=1.3),
    "vanilla, augmented twice": Row(lambda epsilon: Vanilla(), twice=True),
    "EntProp": Row(lambda epsilon: EntProp(epsilon=epsilon)),
    "EntProp, statistics": Row(lambda epsilon: EntProp(epsilon=epsilon), "statistics"),
    "EntProp, affine": Row(lambda epsilon: EntProp(epsilon=epsilon), "affine"),
    "EntProp, shared": Row(lambda epsilon: EntProp(epsilon=epsilon, auxiliary=None)),
    "EntProp, lagged": Row(lambda epsilon: EntProp(epsilon=epsilon, lagged=True)),
    "EntProp, lagged, equal budget": Row(lambda epsilon: EntProp(epsilon=epsilon, lagged=True, equal_budget=True)),
    "EntProp, unmixed": Row(lambda epsilon: EntProp(epsilon=epsilon, mix=None)),
    "EntProp, unmixed, shared": Row(unmixed(auxiliary=None)),
    "EntProp, unmixed, statistics": Row(unmixed(), "statistics"),
    "EntProp, view": Row(lambda epsilon: EntProp.augmented(), "statistics"),
    "EntProp, view, all copied": Row(lambda epsilon: EntProp.augmented(copies="all")),
    "EntProp, view, shared": Row(lambda epsilon: EntProp.augmented(auxiliary=None)),
    "EntProp, view, random selection": Row(lambda epsilon: EntProp.augmented(uncertainty="random"), "statistics"),
    "EntProp, view, RandAugment": Row(lambda epsilon: EntProp.augmented(view="randaugment"), "statistics"),
    "EntProp, view, noise": Row(lambda epsilon: EntProp.augmented(view=gaussian), "statistics"),
    "EntProp, view, lagged": Row(lambda epsilon: EntProp.augmented(lagged=True), "statistics"),
    "EntProp, unmixed, statistics, lagged, equal budget": Row(unmixed(lagged=True, equal_budget=True), "statistics"),
    "EntProp, lagged, equal budget, statistics": Row(
        lambda epsilon: EntProp(epsilon=epsilon, lagged=True, equal_budget=True), "statistics"
    ),
    "random selection": Row(lambda epsilon: EntProp(epsilon=epsilon, uncertainty=uncertainty.random)),
    "random uncertainty, statistics": Row(
        lambda epsilon: EntProp(epsilon=epsilon, uncertainty=uncertainty.random), "statistics"
    ),
    "finetuning": Row(lambda epsilon: EntProp.finetuning(epsilon=epsilon, copies="all")),
    "finetuning, statistics": Row(lambda epsilon: EntProp.finetuning(epsilon=epsilon), "statistics"),
    "finetuning, statistics, plain at last": Row(
        lambda epsilon: EntProp.finetuning(epsilon=epsilon), "statistics", last=lambda epsilon: Vanilla()
    ),
    "finetuning, statistics, k = 0.1": Row(
        lambda epsilon: EntProp.finetuning(epsilon=epsilon, fraction=0.1), "statistics"
    ),
    "finetuning, statistics, k = 0.125": Row(
        lambda epsilon: EntProp.finetuning(epsilon=epsilon, fraction=0.125), "statistics"
    ),
    "finetuning, statistics, random selection": Row(
        lambda epsilon: EntProp.finetuning(epsilon=epsilon, uncertainty="random"), "statistics"
    ),
    "finetuning, statistics, averaged": Row(
        lambda epsilon: EntProp.finetuning(epsilon=epsilon), "statistics", average=0.99
    ),
    "vanilla, head first": Row(lambda epsilon: Vanilla(), head_first=True),
    "finetuning, statistics, head first": Row(
        lambda epsilon: EntProp.finetuning(epsilon=epsilon), "statistics", head_first=True
    ),
    "vanilla, head first, halfway": Row(lambda epsilon: Vanilla(), halfway_of="vanilla, head first"),
    "finetuning, statistics, head first, halfway": Row(
        lambda epsilon: EntProp.finetuning(epsilon=epsilon),
        "statistics",
        halfway_of="finetuning, statistics, head first",
    ),
    "finetuning, affine": Row(lambda epsilon: EntProp.finetuning(epsilon=epsilon, copies="affine"), "affine"),
    "finetuning, shared": Row(lambda epsilon: EntProp.finetuning(epsilon=epsilon, auxiliary=None)),
    "FastAdvProp": Row(lambda epsilon: FastAdvProp() if epsilon is None else FastAdvProp(epsilon=epsilon)),
    # Variations of "EntProp, unmixed, statistics".
    "... random selection": Row(unmixed(uncertainty="random"), "statistics"),
    "... random selection at first": Row(unmixed(), "statistics", first=unmixed(uncertainty="random")),
    "... nothing hardened at first": Row(unmixed(), "statistics", first=lambda epsilon: Vanilla()),
    "... k = 0.6": Row(unmixed(fraction=0.6), "statistics"),
    "... n = 3": Row(unmixed(attack_steps=3), "statistics"),
    "... epsilon / 4": scaled(0.25),
    "... epsilon / 2": scaled(0.5),
    "... 2 epsilon": scaled(2),
    "... 3 epsilon": scaled(3),
    "... Gaussian noise": changed(gaussian),
    "... Fourier noise": changed(fourier),
    "... AugMix": changed("augmix"),
    "... TrivialAugment": changed("trivialaugment"),
    "... JSD": Row(lambda epsilon: Consistent(epsilon=epsilon or 1 / 255), "statistics"),
    "... TrivialAugment, JSD": Row(lambda epsilon: Consistent(TRIVIAL_AUGMENT), "statistics"),
    "... TrivialAugment, 4 JSD": Row(lambda epsilon: Consistent(TRIVIAL_AUGMENT, weight=48.0), "statistics"),
    "... TrivialAugment, JSD / 4": Row(lambda epsilon: Consistent(TRIVIAL_AUGMENT, weight=3.0), "statistics"),
    "... TrivialAugment, JSD, random selection": Row(
        lambda epsilon: Consistent(TRIVIAL_AUGMENT, random=True), "statistics"
    ),
    "... TrivialAugment, JSD, step": Row(
        lambda epsilon: Consistent(TRIVIAL_AUGMENT, epsilon=epsilon or 1 / 255), "statistics"
    ),
    "... TrivialAugment, JSD, recalibrated": Row(
        lambda epsilon: Consistent(TRIVIAL_AUGMENT), "statistics", recalibrate=True
    ),
    "vanilla, recalibrated": Row(lambda epsilon: Vanilla(), recalibrate=True),
    "... recalibrated": Row(unmixed(), "statistics", recalibrate=True),
    "... averaged": Row(unmixed(), "statistics", average=0.97),
    "vanilla, averaged": Row(lambda epsilon: Vanilla(), average=0.97),
}
