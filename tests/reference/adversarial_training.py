"""One step of PGD adversarial training (Madry et al., 2018) or TRADES (Zhang et al., 2019), naive and in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.reference.networks import Networks, Outcome, divergence, entropy, mean_loss, pgd


def step(
    module: nn.Module,
    main: dict[str, Tensor],
    auxiliary: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    kind: str = "pgd",
    steps: int = 10,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    start: Tensor | None = None,
    beta: float = 6.0,
    clean_weight: float = 0.0,
    entropy_weight: float = 0.0,
    label_smoothing: float = 0.0,
    regularise: str = "both",
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Outcome:
    """``start`` is where the attack begins, on running statistics. The auxiliary network has no part in any of it."""
    nets = Networks(module, main, auxiliary)
    on_clean = {"smoothing": label_smoothing, "entropy_weight": entropy_weight} if regularise != "adversarial" else {}
    on_hard = {"smoothing": label_smoothing, "entropy_weight": entropy_weight} if regularise != "clean" else {}
    limits = {"steps": steps, "epsilon": epsilon, "step_size": step_size, "mean": mean, "std": std}
    start = images if start is None else start

    if kind == "trades":
        with torch.no_grad():
            truth = nets.main(images, "running")
        hardened = pgd(start, images, lambda pixels: divergence(truth, nets.main(pixels, "running")), **limits)
        clean = nets.main(images)
        hard = nets.main(hardened)
        loss = mean_loss(clean, labels, **on_clean) + beta * divergence(clean, hard)
        if on_hard:
            loss = loss - entropy_weight * sum(entropy(row) for row in hard) / len(hard)
    else:
        hardened = pgd(start, images, lambda pixels: mean_loss(nets.main(pixels, "running"), labels), **limits)
        loss, clean = 0.0, None
        if clean_weight > 0:
            clean = nets.main(images)
            loss = clean_weight * mean_loss(clean, labels, **on_clean)
        hard = nets.main(hardened)
        loss = loss + (1 - clean_weight) * mean_loss(hard, labels, **on_hard)
    return nets.outcome(
        len(images),
        nets.gradients(loss),
        loss=loss,
        main_loss=loss,
        logits=hard if clean is None else clean,
        aux_loss=None,
        aux_logits=None,
        aux_images=hardened,
    )
