"""EntProp (Enomoto, "EntProp: High Entropy Propagation for Improving Accuracy and Robustness", UAI 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import ascend, check_magnitude
from entprop_wrap.functional.mixing import Mixer, find_mixer
from entprop_wrap.functional.targets import Target, mix_batch
from entprop_wrap.functional.uncertainty import Uncertainty, compute_scores, find_uncertainty, num_selected, top_k
from entprop_wrap.methods import lagged
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.input_gradient import ImageGradient, watching
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.methods.views import Augmentation, augmented, find_augmentation
from entprop_wrap.utils.options import (
    check_choice,
    check_flag,
    check_integer,
    check_name,
    check_number,
    store_as_python,
)
from entprop_wrap.utils.tensors import index_rows


@dataclass(frozen=True)
class EntProp(Method):
    """Train the most uncertain samples, made harder, through auxiliary norms, and everything else as usual.

    A step: the batch, augmented with MixUp, goes through the main norms, which gives the loss, the entropy of each
    sample and, for free, the gradient of the loss with respect to the images. The ``fraction`` of highest entropy moves
    along that gradient (and, with more ``attack_steps``, further along gradients through the auxiliary norms) and goes
    through the auxiliary norms. Both losses train the shared weights.

    Cost: ``1 + fraction * max(attack_steps, 1)`` passes. Mixing and the first attack step add none.

    How to use: ``fraction`` and ``attack_steps`` trade time for robustness; the paper reports (0.2, 1), (0.6, 1), (0.2,
    5) and (0.6, 5). Have at least 8 auxiliary images a step on batch-norm nets. On data with few grey levels, raise
    ``epsilon`` to a visible step.

    Where the paper is silent or contradicts itself, this class chooses: the perturbation stays within ``epsilon`` (the
    listing adds up clipped perturbations) and within valid pixels, attack passes record no statistics and train no
    weights, and the auxiliary target of a mixed image has two labels.

    Attributes:
        fraction: Share k of the batch to select, in (0, 1]; the number is rounded and at least 2.
        attack_steps: Number n of signed gradient steps, at least 0; 0 leaves the selected images where they are.
        epsilon: Largest change of a pixel, as a fraction of the pixel range. None: ``(n + 1)/255``, and 1/255 for n = 1
            (section 4.1.2).
        step_size: Change per attack step, in the same unit. None: all of ``epsilon`` for one step,
            ``epsilon / (n + 1)`` for more, which is 1/255 at the default epsilon (section 4.1.2).
        mix: What raises entropy before selection: ``MixUp(alpha)`` or "mixup", ``CutMix(alpha)`` or "cutmix", your own
            mixer, or None.
        mix_on: "batch" mixes the whole batch before the main pass (Algorithm 1); "auxiliary" keeps the main pass clean
            and mixes the selected images with each other, and their gradients, too.
        view: Augments the selected images, instead of gradient steps (``attack_steps=0``): "trivialaugment",
            "randaugment", "augmix" or "gaussian" for each image, or a function of pixels ``(N, C, H, W)`` in [0, 1].
            Not in the paper; chosen by measurement (docs/recipes.md). None: nothing.
        uncertainty: Score to select by, ``(logits, labels) -> (N,)``, or the name of one; see
            ``entprop_wrap.functional.uncertainty``. The labels are those of the images themselves, also where the
            batch is mixed. "random" is the control.
        weighting: "per_image" gives every image of both passes the same weight, so that the mean auxiliary loss has
            weight ``k`` (the intent of section 4.1.3, whose formula is not given); "sum" adds both means (Algorithm 1).
        auxiliary: Name of the auxiliary domain; None lets the selected images share the main norms, on a plain or a
            wrapped model: the same step without copies, the control that shows what copies do. Batch norms then record
            the statistics of the batch and of the selected images, one after the other.
        copies: Which tensors the auxiliary domain has of its own, "all", "statistics" or "affine", see
            :func:`entprop_wrap.wrap`. Used where ``TrainingStep`` or a trainer wraps the model. A model that you
            wrapped must have the same ``copies``; "all" accepts any.
        lagged: Train the hardened images one step later, together with the next batch: one forward, one backward and
            one all-reduce a step, at the price of pixel gradients that are one step old. In that pass norm layers treat
            the two groups of rows separately; a model's first step checks that it allows this, and trains on the batch
            alone. See :mod:`entprop_wrap.methods.lagged`.
        equal_budget: With ``lagged``, drop one image of the batch for each hardened image that returns, so that a step
            has exactly as many as vanilla training (the budget of Fast AdvProp, ICLR 2022). ``fraction`` is at most
            0.5. A batch of which less than half would be left, as the last of an epoch may be, is trained whole.
        alpha: Alpha of the mixer that ``mix`` names. Moved into the mixer; reads back as None.

    Raises:
        ConfigurationError: An option is out of range.
        PixelRangeError: ``epsilon`` or ``step_size`` is not a fraction of the pixel range.
    """

    fraction: float = 0.2
    attack_steps: int = 1
    epsilon: float | None = None
    step_size: float | None = None
    mix: str | None | Mixer = "mixup"  # noqa: RUF036 - parsers of command lines try types in this order
    mix_on: Literal["batch", "auxiliary"] = "batch"
    view: str | None | Augmentation = None  # noqa: RUF036
    uncertainty: str | None | Uncertainty = "entropy"  # noqa: RUF036
    weighting: Literal["per_image", "sum"] = "per_image"
    auxiliary: str | None = "aux"
    copies: Literal["all", "affine", "statistics"] = "all"
    lagged: bool = False
    equal_budget: bool = False
    alpha: float | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        store_as_python(self)
        if self.auxiliary is not None:
            check_name("auxiliary", self.auxiliary, ", or None for shared norms")
        check_number("fraction", self.fraction, lambda value: 0 < value <= 1, "in (0, 1], a share of the batch")
        check_integer("attack_steps", self.attack_steps, 0)
        for name in ("epsilon", "step_size"):
            if (value := getattr(self, name)) is not None:
                check_magnitude(name, value)
        # From plain types, as command lines and YAML files have them, to what they stand for.
        object.__setattr__(self, "mix", find_mixer(self.mix, self.alpha))
        object.__setattr__(self, "alpha", None)
        object.__setattr__(
            self, "uncertainty", find_uncertainty("entropy" if self.uncertainty is None else self.uncertainty)
        )
        if self.view is not None:
            object.__setattr__(self, "view", find_augmentation(self.view))
            if self.attack_steps:
                raise ConfigurationError(
                    f"view takes the place of gradient steps, found attack_steps={self.attack_steps}: write "
                    "attack_steps=0 with it, or view=None."
                )
        for name, allowed in (
            ("mix_on", ("batch", "auxiliary")),
            ("weighting", ("per_image", "sum")),
            ("copies", ("all", "affine", "statistics")),
        ):
            check_choice(name, getattr(self, name), allowed)
        check_flag("lagged", self.lagged)
        check_flag("equal_budget", self.equal_budget)
        if self.equal_budget and not self.lagged:
            raise ConfigurationError("equal_budget=True is an option of the lagged step: write lagged=True, too.")
        if self.equal_budget and self.fraction > 0.5:
            raise ConfigurationError(
                f"equal_budget=True selects from the images of a batch that are not replaced: expected a fraction of "
                f"at most 0.5, found {self.fraction}."
            )

    @classmethod
    def finetuning(cls, **options: Any) -> EntProp:
        """Return a preset for fine-tuning pretrained weights; ``options`` change it.

        The main pass stays clean. The auxiliary images are a few more (``fraction=0.3``), mixed among themselves, and
        most of them hardly at all (``MixUp(0.1)``). The domains share affine parameters: only running statistics are
        apart, and layer and group norms, which keep none, are shared. A model that you wrap yourself needs
        ``wrap(model, copies="statistics")``; otherwise the step raises. The paper mixes the whole batch, for 100
        epochs; in 4 to 8 that costs accuracy. Not in the paper; chosen by measurement: docs/finetuning.md has the
        evidence, and what did not work.
        """
        mix = {} if "mix" in options else {"alpha": 0.1}
        return cls(**{"fraction": 0.3, "mix_on": "auxiliary", "copies": "statistics", **mix, **options})

    @classmethod
    def augmented(cls, **options: Any) -> EntProp:
        """Return a preset for training on top of an augmentation (RandAugment, TrivialAugment); ``options`` change it.

        The selected images are augmented once more, instead of gradient steps, and nothing is mixed. The domains share
        affine parameters, as in :meth:`finetuning`. With ``view=None, attack_steps=1`` the images move along the
        gradient instead. Not in the paper; chosen by measurement: docs/recipes.md has the evidence, from scratch on
        small data.
        """
        return cls(**{"mix": None, "copies": "statistics", "view": "trivialaugment", "attack_steps": 0, **options})

    @property
    def attack(self) -> tuple[float, float]:
        """Epsilon and step size in effect, as fractions of the pixel range."""
        parts = 1 if self.attack_steps <= 1 else self.attack_steps + 1
        epsilon = parts / 255 if self.epsilon is None else self.epsilon
        return epsilon, epsilon / parts if self.step_size is None else self.step_size

    def step(self, step: Step) -> StepOutput:
        """Run the step (Algorithm 1), or with ``lagged`` its form in one pass."""
        if self.lagged:
            return self._lagged_step(step)
        batch = len(step.images)
        number = num_selected(batch, self.fraction)
        images, target = self._mixed(step, batch)
        gradient = step.image_gradient(images) if self.attack_steps > 0 else None
        with step.only_local(), watching(gradient, images):
            logits = step.forward(images)
            main_loss = target.loss(step.loss, logits)
            score = compute_scores(cast(Uncertainty, self.uncertainty), logits.detach(), step.labels, step.generator)
            selected = top_k(score, number)
            step.backward(main_loss)
        logits, main_loss = logits.detach(), main_loss.detach()
        step.warn_if_few(number)
        aux_images, aux_target = self._harden(step, images, gradient, target, selected)
        del gradient, images  # else the auxiliary pass runs beside a batch of images
        weight = number / batch if self.weighting == "per_image" else 1.0
        aux_logits, aux_loss = step.auxiliary_pass(self.auxiliary, aux_images, aux_target, weight=weight)
        return step.output(
            loss=main_loss + weight * aux_loss,
            main_loss=main_loss,
            logits=logits,
            passes=(batch + number * max(self.attack_steps, 1)) / batch,
            aux_loss=aux_loss,
            aux_logits=aux_logits,
            aux_images=aux_images,
            selected=selected,
        )

    def _lagged_step(self, step: Step) -> StepOutput:
        if step.loss.asked:
            raise ConfigurationError(
                f"lagged=True trains images of two batches in one pass; found a loss that asks for "
                f"{', '.join(sorted(step.loss.asked))} of one. Write lagged=False, or loss(logits, labels)."
            )
        waiting = lagged.waiting_for(step.model, step.images, step.labels, step.space)
        batch, back = len(step.images), 0 if waiting is None else len(waiting.images)
        fresh = batch - back if self.equal_budget and 2 * back <= batch else batch
        number = num_selected(batch, self.fraction)
        images, target = self._mixed(step, fresh)
        gradient = step.image_gradient(images) if self.attack_steps > 0 else None
        everything = images if waiting is None else torch.cat([images, waiting.images])
        with step.rows_split(self.auxiliary, fresh, len(everything)), watching(gradient, everything):
            logits = step.forward(everything)
            main_loss = loss = target.loss(step.loss, logits[:fresh])
            aux_loss = None
            if waiting is not None:
                aux_loss = waiting.target.loss(step.loss, logits[fresh:])
                weight = back / batch if self.weighting == "per_image" else 1.0
                loss = fresh / batch * main_loss + weight * aux_loss
            uncertainty = cast(Uncertainty, self.uncertainty)
            score = compute_scores(uncertainty, logits[:fresh].detach(), step.labels[:fresh], step.generator)
            selected = top_k(score, number)
            step.backward(loss)
        logits = logits.detach()
        step.warn_if_few(number)
        lagged.put(step.model, *self._harden(step, images, gradient, target, selected), step.space)
        return step.output(
            loss=loss,
            main_loss=main_loss,
            logits=logits[:fresh],
            passes=(len(everything) + number * max(self.attack_steps - 1, 0)) / batch,
            aux_loss=aux_loss,
            aux_logits=None if waiting is None else logits[fresh:],
            aux_images=None if waiting is None else waiting.images,
            selected=selected,
        )

    def _mixed(self, step: Step, number: int) -> tuple[Tensor, Target]:
        """Return the first ``number`` images, mixed if the batch is to be, as a leaf, and their target."""
        if self.mix is not None:
            step.warn_if_mixed()
        images, target = step.images[:number], Target(step.labels[:number])
        mixer = cast("Mixer | None", self.mix)
        if mixer is not None and self.mix_on == "batch":
            _, images, target = mix_batch(mixer, images, target, step.generator)
        return images.detach(), target

    def _harden(
        self, step: Step, images: Tensor, source: ImageGradient | None, target: Target, selected: Tensor
    ) -> tuple[Tensor, Target]:
        origin, target = index_rows(images.detach(), selected), target.rows(selected)
        gradient = torch.zeros_like(origin) if source is None else source.rows(selected)
        mixer = cast("Mixer | None", self.mix)
        if mixer is not None and self.mix_on == "auxiliary":
            mix, origin, target = mix_batch(mixer, origin, target, step.generator)
            # The gradient of the mixed loss for a change that both parents share, to first order.
            gradient = mix.apply(gradient)

        if self.view is not None:
            return augmented(step, origin, cast(Augmentation, self.view), "of view="), target
        epsilon, step_size = self.attack
        hardened = origin
        for attack_step in range(self.attack_steps):
            if attack_step > 0:
                with step.auxiliary(self.auxiliary, record_statistics=False):
                    gradient = step.pixel_gradient(hardened, target)
            hardened = ascend(hardened, origin, gradient, epsilon=epsilon, step_size=step_size, space=step.space)
        return hardened, target
