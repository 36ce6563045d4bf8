"""Fast AdvProp (Mei et al., "Fast AdvProp", ICLR 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import ascend, check_magnitude, uniform_start
from entprop_wrap.functional.targets import Target
from entprop_wrap.functional.uncertainty import num_selected
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.input_gradient import input_gradient
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.utils.options import check_flag, check_number


@dataclass(frozen=True)
class FastAdvProp(Method):
    """Most of the batch is trained clean, the rest adversarially; no image is both, no pass is for the attack alone.

    The last ``fraction`` of the batch (which is shuffled anyway) gets uniform noise; one pass through the auxiliary
    norms gives the gradient of the pixels and trains on the noisy images at weight ``beta``; one step along it
    gives the adversarial images, which train at weight ``1 - beta`` (Algorithm 1: 0.5 both). Every image counts alike:
    losses are sums over images, divided by how many images each parameter has seen, so that shared weights, main norms
    and auxiliary norms learn at one rate (gradient re-balancing 1:1:1, section 3.3). Both auxiliary passes normalise
    with batch statistics and record them.

    Cost: ``1 + fraction`` passes. The paper divides the number of epochs by that, so that the whole training costs as
    much as vanilla training: train for :meth:`equal_cost_epochs`.

    Attributes:
        fraction: Share of the batch that is trained adversarially, in (0, 1); the number is rounded, and each part has
            at least 2 images.
        epsilon: Largest change of a pixel and size of the one step, as a fraction of the pixel range.
        beta: Weight of the noise pass; the adversarial pass has ``1 - beta``. In (0, 1).
        shuffle: Exchange adversarial images between processes, so that batch statistics do not give away which images
            were attacked together ("Shuffling BN", section 3.3). Without effect on one process.
        auxiliary: Name of the auxiliary domain.
    """

    fraction: float = 0.2
    epsilon: float = 1 / 255
    beta: float = 0.5
    shuffle: bool = True
    auxiliary: str = "aux"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_magnitude("epsilon", self.epsilon)
        for name in ("fraction", "beta"):
            check_number(name, getattr(self, name), lambda value: 0 < value < 1, "in (0, 1)")
        check_flag("shuffle", self.shuffle)

    def equal_cost_epochs(self, epochs: int) -> int:
        """Return the published budget: ``epochs / (1 + fraction)``, rounded down, at least 1.

        They cost no more than ``epochs`` of vanilla training; the paper trains 87 instead of 105 at a
        fraction of 0.2. The learning rate's schedule is to end with them.
        """
        return max(1, math.floor(epochs / (1 + self.fraction) + 1e-9))  # 12 / 1.2 is not to be 9

    def step(self, step: Step) -> StepOutput:
        """Run the step (Algorithm 1)."""
        batch = len(step.images)
        number = count_adversarial(batch, self.fraction)
        clean, weight = batch - number, number / batch
        step.warn_if_few(number)
        if self.shuffle and "rows" in step.loss.asked and processes() > 1:
            raise ConfigurationError(
                "loss asks for rows, which shuffling between processes mixes: write shuffle=False."
            )

        with step.only_local(), step.norm_gradients_scaled(None, batch / clean):
            logits = step.forward(step.images[:clean])
            main_loss = Target(step.labels[:clean]).loss(step.loss, logits)
            step.backward((1 - weight) * main_loss)

        origin, index = step.images[clean:], torch.arange(clean, batch, device=step.labels.device)
        target = Target(step.labels[clean:], index=index)
        noisy = uniform_start(origin, self.epsilon, step.space, step.generator).requires_grad_()
        with step.auxiliary(self.auxiliary), step.norm_gradients_scaled(self.auxiliary, 1 / weight):
            with step.only_local():
                noise_loss = target.loss(step.loss, step.forward(noisy))
                step.backward(self.beta * weight * noise_loss)
            gradient, epsilon = input_gradient(noisy), self.epsilon
            images = ascend(noisy.detach(), origin, gradient, epsilon=epsilon, step_size=epsilon, space=step.space)
            if self.shuffle:
                images, labels = shuffle_between_processes(images, target.labels, step.generator)
                target = Target(labels, index=index)
            aux_logits = step.forward(images)
            aux_loss = target.loss(step.loss, aux_logits)
            step.backward((1 - self.beta) * weight * aux_loss)

        aux_loss = self.beta * noise_loss + (1 - self.beta) * aux_loss
        return step.output(
            loss=(1 - weight) * main_loss + weight * aux_loss,
            main_loss=main_loss,
            logits=logits,
            passes=1.0 + weight,
            aux_loss=aux_loss,
            aux_logits=aux_logits,
            aux_images=images,
        )


def count_adversarial(batch: int, fraction: float) -> int:
    """Return how many of ``batch`` images are trained adversarially; raise where it is too small for two parts."""
    if batch < 4:
        raise ConfigurationError(
            f"Expected a batch of at least 4 images, 2 clean and 2 adversarial ones, found {batch}. Choose another "
            "batch size, or drop the last batch: DataLoader(..., drop_last=True)."
        )
    return min(num_selected(batch, fraction), batch - 2)


def shuffle_between_processes(
    images: Tensor, labels: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Permute images and labels over all processes, as the first one draws; each holds as many as before."""
    if processes() == 1:
        return images, labels
    rank, alike = torch.distributed.get_rank(), [1] * processes()
    sizes = gather(torch.tensor([len(images)], device=images.device), alike).tolist()  # a last batch may be smaller
    order = torch.randperm(sum(sizes), generator=generator, device="cpu").to(images.device)
    torch.distributed.broadcast(order, src=0)
    mine = torch.split(order, sizes)[rank]
    return gather(images, sizes)[mine], gather(labels, sizes)[mine]


def processes() -> int:
    """Return the number of processes that train together."""
    initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if initialised else 1


def gather(tensor: Tensor, sizes: list[int]) -> Tensor:
    """Return the rows of all processes, which hold ``sizes`` of them, in the order of ranks."""
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
