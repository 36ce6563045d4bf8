"""One step of fine-grained AdvProp (Xie et al., CVPR 2020, slides 37-39 of the authors' talk), naive, in float64.

Every branch has an auxiliary network of its own, all of which share their other weights with the main network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tests.reference.networks import Networks, mean_loss, pgd


@dataclass(frozen=True)
class Branch:
    """An attack from ``start``, or, without ``steps``, images that were made already: ``start`` itself."""

    start: Tensor
    steps: int = 0
    epsilon: float = 4 / 255
    step_size: float = 1 / 255
    wrong: Tensor | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """Gradients and buffers go by the plain module's own names, those of auxiliary networks by branch first."""

    loss: Tensor
    main_loss: Tensor
    logits: Tensor
    losses: dict[str, Tensor]
    aux_logits: dict[str, Tensor]
    aux_images: dict[str, Tensor]
    passes: float
    main_gradients: dict[str, Tensor]
    auxiliary_gradients: dict[str, dict[str, Tensor]]
    main_buffers: dict[str, Tensor]
    auxiliary_buffers: dict[str, dict[str, Tensor]]


def step(
    module: nn.Module,
    main: dict[str, Tensor],
    auxiliaries: dict[str, dict[str, Tensor]],
    images: Tensor,
    labels: Tensor,
    branches: dict[str, Branch],
    *,
    attack_statistics: str = "running",
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Outcome:
    """From the given weights, none of which is changed."""
    nets = Networks(module, main, {})
    logits = nets.main(images)
    main_loss = mean_loss(logits, labels)
    total, passed = dict(nets.gradients(main_loss)[0]), nets.images_passed
    loss = main_loss.detach()
    losses, aux_logits, aux_images, own, buffers = {}, {}, {}, {}, {}
    for name, branch in branches.items():
        one = Networks(module, main, auxiliaries[name])

        def objective(pixels: Tensor, one: Networks = one, branch: Branch = branch) -> Tensor:
            found = one.auxiliary(pixels, attack_statistics)
            return mean_loss(found, labels) if branch.wrong is None else -mean_loss(found, branch.wrong)

        limits = {"epsilon": branch.epsilon, "step_size": branch.step_size, "mean": mean, "std": std}
        aux_images[name] = pgd(branch.start, images, objective, steps=branch.steps, **limits)
        found = one.auxiliary(aux_images[name])
        value = mean_loss(found, labels)
        shared, own[name] = one.gradients(branch.weight * value)
        total = {key: gradient + shared[key] for key, gradient in total.items()}
        losses[name], aux_logits[name] = value.detach(), found.detach()
        buffers[name] = one.auxiliary_buffers
        passed += one.images_passed
        loss = loss + branch.weight * value.detach()
    return Outcome(
        loss,
        main_loss.detach(),
        logits.detach(),
        losses,
        aux_logits,
        aux_images,
        passed / len(images),
        total,
        own,
        nets.main_buffers,
        buffers,
    )
