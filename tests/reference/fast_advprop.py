"""One Fast AdvProp step (Mei et al., ICLR 2022, Algorithm 1 and section 3.3), naive and in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.reference.entprop import perturb
from tests.reference.networks import Networks, Outcome, count, mean_loss


def step(
    module: nn.Module,
    main: dict[str, Tensor],
    auxiliary: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    noisy: Tensor,
    fraction: float = 0.2,
    epsilon: float = 1 / 255,
    beta: float = 0.5,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Outcome:
    """``noisy`` are the last images, those that are trained adversarially, with their noise."""
    nets = Networks(module, main, auxiliary)
    batch = len(images)
    hard = min(count(batch, fraction), batch - 2)
    clean = batch - hard
    assert len(noisy) == hard

    # three sums over images
    logits = nets.main(images[:clean])
    from_clean = clean * mean_loss(logits, labels[:clean])
    start = noisy.detach().clone().requires_grad_()
    from_noise = hard * mean_loss(nets.auxiliary(start), labels[clean:])
    (gradient,) = torch.autograd.grad(from_noise, [start], retain_graph=True)
    hardened = perturb(images[clean:], noisy, gradient, epsilon=epsilon, step_size=epsilon, mean=mean, std=std)
    aux_logits = nets.auxiliary(hardened)
    from_hard = hard * mean_loss(aux_logits, labels[clean:])

    # each parameter's gradient is divided by the number of images that it has seen
    total = from_clean + beta * from_noise + (1 - beta) * from_hard
    main_gradients, auxiliary_gradients = nets.gradients(total)
    seen = {name: clean if name in auxiliary else batch for name in main_gradients}
    main_gradients = {name: g / seen[name] for name, g in main_gradients.items()}
    auxiliary_gradients = {name: g / hard for name, g in auxiliary_gradients.items()}
    return nets.outcome(
        batch,
        (main_gradients, auxiliary_gradients),
        loss=total / batch,
        main_loss=from_clean / clean,
        logits=logits,
        aux_loss=(beta * from_noise + (1 - beta) * from_hard) / hard,
        aux_logits=aux_logits,
        aux_images=hardened,
    )
