"""One AdvProp step (Xie et al., CVPR 2020, slide 15 of the authors' talk), naive and in float64."""

from collections.abc import Sequence

from torch import Tensor, nn

from tests.reference.networks import Networks, Outcome, mean_loss, pgd


def step(
    module: nn.Module,
    main: dict[str, Tensor],
    auxiliary: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 5,
    epsilon: float = 4 / 255,
    step_size: float = 1 / 255,
    start: Tensor | None = None,
    wrong: Tensor | None = None,
    attack_statistics: str = "running",
    weight: float = 1.0,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Outcome:
    """``start`` is where the attack begins, ``wrong`` the classes of a targeted attack."""
    nets = Networks(module, main, auxiliary)

    def objective(pixels: Tensor) -> Tensor:
        logits = nets.auxiliary(pixels, attack_statistics)
        return mean_loss(logits, labels) if wrong is None else -mean_loss(logits, wrong)

    hardened = pgd(
        images if start is None else start,
        images,
        objective,
        steps=steps,
        epsilon=epsilon,
        step_size=step_size,
        mean=mean,
        std=std,
    )
    logits = nets.main(images)
    main_loss = mean_loss(logits, labels)
    aux_logits = nets.auxiliary(hardened)
    aux_loss = mean_loss(aux_logits, labels)
    loss = main_loss + weight * aux_loss
    return nets.outcome(
        len(images),
        nets.gradients(loss),
        loss=loss,
        main_loss=main_loss,
        logits=logits,
        aux_loss=aux_loss,
        aux_logits=aux_logits,
        aux_images=hardened,
    )
