"""ME-ADA (Zhao et al., NeurIPS 2020), naive and in float64: the ascent of single images, and one step with it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.reference.networks import Networks, Outcome, count, entropy, mean_loss


def climb(
    logits_and_features: Callable[[Tensor], tuple[Tensor, Tensor]],
    images: Tensor,
    labels: Tensor,
    *,
    eta: float,
    gamma: float,
    steps: int,
    step_size: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Let every image climb on its own, as a batch of one, in pixels between 0 and 1."""
    results = []
    for image, label in zip(images, labels, strict=True):
        middle, spread = (image.new_tensor(values).view(3, 1, 1) for values in (mean, std))
        pixels = image * spread + middle
        with torch.no_grad():
            start = logits_and_features(image[None])[1][0]
        for _ in range(steps):
            pixels = pixels.detach().clone().requires_grad_()
            logits, features = logits_and_features(((pixels - middle) / spread)[None])
            distance = sum((a - b) ** 2 for a, b in zip(features[0], start, strict=True)) / len(start)
            height = mean_loss(logits, label[None]) + eta * entropy(logits[0]) - gamma * distance
            pixels = pixels + step_size * torch.autograd.grad(height, [pixels])[0]
        results.append((pixels.detach().clamp(0, 1) - middle) / spread)
    return torch.stack(results)


def step(
    module: nn.Module,
    main: dict[str, Tensor],
    auxiliary: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    head: str,
    fraction: float = 1.0,
    weight: float = 1.0,
    eta: float = 10.0,
    gamma: float = 1.0,
    steps: int = 15,
    step_size: float = 0.0390625,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Outcome:
    """``head`` is the name of the layer that makes the logits; its input is the feature space."""
    nets, seen = Networks(module, main, auxiliary), []

    def logits_and_features(pixels: Tensor) -> tuple[Tensor, Tensor]:
        handle = module.get_submodule(head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits = nets.main(pixels, "running")
        handle.remove()
        return logits, seen.pop()

    logits = nets.main(images)
    main_loss = mean_loss(logits, labels)
    number = count(len(images), fraction)
    limits = {"eta": eta, "gamma": gamma, "steps": steps, "step_size": step_size, "mean": mean, "std": std}
    grown = climb(logits_and_features, images[:number], labels[:number], **limits)
    aux_logits = nets.auxiliary(grown)
    aux_loss = mean_loss(aux_logits, labels[:number])
    loss = main_loss + weight * number / len(images) * aux_loss
    return nets.outcome(
        len(images),
        nets.gradients(loss),
        loss=loss,
        main_loss=main_loss,
        logits=logits,
        aux_loss=aux_loss,
        aux_logits=aux_logits,
        aux_images=grown,
    )
