"""ME-ADA (Zhao et al., "Maximum-Entropy Adversarial Data Augmentation", NeurIPS 2020): as growth, and as a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, SequentialSampler
from tqdm.auto import tqdm

from entprop_wrap.data.batches import images_and_labels
from entprop_wrap.data.grown_images import GrownImages, collate, form_of, to_bytes, without_augmentation
from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import Checker, check_images, check_labels, checker_of
from entprop_wrap.errors import ConfigurationError, UnsupportedModelError
from entprop_wrap.functional.losses import Loss, cross_entropy, mean_entropy
from entprop_wrap.functional.uncertainty import num_selected
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_loss import StepLoss
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.utils.features import features_of
from entprop_wrap.utils.model_output import logits_of
from entprop_wrap.utils.modules import check_module, evaluating, plain_model
from entprop_wrap.utils.options import check_integer, check_number, shown, store_as_python
from entprop_wrap.utils.tensors import refuse_inference_mode

__all__ = ["MEADA", "EntropyAscent", "grow"]


@dataclass(frozen=True)
class EntropyAscent:
    """How ME-ADA makes an image hard: gradient ascent on loss and entropy, held back in feature space.

    Each image x with label y climbs, from itself,

        J(x) = loss(f(x), y) + eta * H(softmax f(x)) - gamma * mean((z(x) - z(x0))^2)

    by plain steps ``pixel += step_size * dJ/dpixel``: no sign, no momentum, no projection; pixels are clamped to their
    valid range once, after the last step. H is in nats; z is the input of the layer that makes the logits, averaged
    over positions where there are any. The model runs in evaluation mode (running statistics, no dropout), so that an
    image's result depends on no other image. Where a gradient overflows, as fp16 may, the pixel stays for that step.

    *Step sizes.* The official code ascends on means over a batch of B images that are normalised with
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

    @classmethod
    def cifar(cls, **options: Any) -> MEADA:
        """Return a step with the published ascent for CIFAR-10 and CIFAR-100."""
        return cls(**{"ascent": EntropyAscent.cifar(), **options})

    @classmethod
    def mnist(cls, **options: Any) -> MEADA:
        """Return a step with the published ascent for MNIST."""
        return cls(**{"ascent": EntropyAscent.mnist(), **options})

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


def grow(
    model: nn.Module,
    dataset: Any,
    *,
    ascent: EntropyAscent = EntropyAscent(),
    pixel_space: PixelSpace | None = None,
    loss: Loss | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 128,
    workers: int = 0,
    progress: bool = True,
) -> ConcatDataset[Any]:
    """Return ``dataset`` and, behind it, a maximum-entropy version of each of its images: twice as many samples.

        for phase in range(3):  # CIFAR: 10, 10 and 80 epochs
            Trainer(model, data, method=Vanilla(), config=...).fit()
            data = grow(model, data, ascent=EntropyAscent.cifar())

    Each image climbs once, through the main norms of the model in evaluation mode; the result is rounded to uint8 and
    keeps the label. Grown images climb again in the next phase, without ``augment``. To have the others climb without
    random augmentation too, as the paper has it, grow the dataset without one, and augment what is returned.

    With several processes, each grows a share with the first one's running statistics, and all return the same.

    Differences from the official code (garyzhao/ME-ADA): it grows one epoch or step earlier; cuts pixels off to uint8
    for CIFAR where these are rounded, and keeps MNIST as floats, without its last batch. It reports the checkpoint that
    is best on the *test* sets: do not compare such figures with others.

    Args:
        model: The trained model, wrapped or plain; not changed.
        dataset: Map-style, of ``(image (C, H, W), label)`` or of dicts of these two, with tensors as images.
        ascent: How images climb.
        pixel_space: How the images were normalised; None: they are in [0, 1].
        loss: ``(logits, labels) -> scalar mean``; None: cross-entropy.
        augment: ``image -> image``, in pixel space, applied to a grown image whenever it is loaded.
        batch_size: Images that climb at once, at least 1; the result does not depend on it.
        workers: Processes that load data, at least 0.
        progress: Show a progress bar on the first process.

    Returns:
        Samples in the form of ``dataset``'s; grown images are held in memory, as uint8.

    Raises:
        DataError: The dataset is of another form.
        UnsupportedModelError: The model is sharded.
    """
    check_ascent(ascent)
    check_integer("batch_size", batch_size, 1)
    space = _check(model, pixel_space, augment)
    climbing = without_augmentation(dataset)
    form = form_of(climbing, space)
    inner = plain_model(model)  # a container would have processes wait for one another
    together = dist.is_available() and dist.is_initialized()
    process, processes = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    for buffer in inner.buffers() if processes > 1 else ():
        dist.broadcast(buffer, 0)
    batches = list(BatchSampler(SequentialSampler(climbing), batch_size, drop_last=False))
    loader = DataLoader(climbing, batch_sampler=batches[process::processes], num_workers=workers, collate_fn=collate)
    bar = tqdm(loader, "growing", disable=not progress or process > 0, unit="batch")
    shares = [[_climbed(inner, batch, ascent, loss or cross_entropy, space) for batch in bar]]
    if processes > 1:
        own, shares = shares[0], [[] for _ in range(processes)]
        dist.all_gather_object(shares, own)
    everything = [shares[i % processes][i // processes] for i in range(len(batches))]
    images, labels = (torch.cat(part) for part in zip(*everything, strict=True))
    return ConcatDataset([dataset, GrownImages(images, labels, space, augment=augment, **form)])


def _climbed(
    model: nn.Module, batch: Any, ascent: EntropyAscent, loss: Loss, space: PixelSpace
) -> tuple[Tensor, Tensor]:
    """Return what the images of a batch become, as uint8, and their labels."""
    images, labels = images_and_labels(batch, "dataset")
    check_images(images, space)
    Checker().images(images, space)
    labels = check_labels(labels, images)
    mean = StepLoss(loss, checker_of(model), len(images))

    def forward(moved: Tensor) -> Tensor:
        output = model(moved)
        logits = logits_of(output, len(moved))
        mean.passed(logits, output, moved)
        return logits

    device = next((parameter.device for parameter in model.parameters()), images.device)
    climbed = ascent.run(model, forward, images.to(device), labels.to(device), loss=mean, space=space)
    return to_bytes(climbed, space).cpu(), labels


def _check(model: Any, space: Any, augment: Any) -> PixelSpace:
    """Return the pixel space, after checks of all that is not data."""
    check_module("grow()", model)
    refuse_inference_mode()
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UnsupportedModelError("grow() expects a whole model, found a sharded one: choose DDP.")
    if space is not None and not isinstance(space, PixelSpace):
        raise TypeError(f"pixel_space expects a PixelSpace, found {shown(space)}: write PixelSpace(mean, std).")
    if augment is not None and not callable(augment):
        raise TypeError(f"augment expects a function of one image, found {shown(augment)}.")
    return space or PixelSpace()


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


def check_ascent(ascent: Any) -> None:
    """Raise :class:`ConfigurationError` unless ``ascent`` is an :class:`EntropyAscent`."""
    if not isinstance(ascent, EntropyAscent):
        raise ConfigurationError(f"ascent must be an EntropyAscent(eta=10.0, steps=15, ...), found {shown(ascent)}.")
