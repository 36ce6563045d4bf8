"""One EntProp training step (Enomoto, UAI 2024, Algorithm 1), written to be obviously right rather than fast.

It knows nothing of wrapping. The network is a plain module, only ever called with weights handed to it, and
there are two complete sets of weights: the main network's, and the auxiliary network's, the same but for its
norms. Losses, scores and mixes are written out one sample at a time. Give it float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Blend:
    """Image ``i`` mixed with image ``partner[i]``: MixUp, or a ``box`` (top, bottom, left, right)."""

    share: float
    partner: Sequence[int]
    box: tuple[int, int, int, int] | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The mix of an image-shaped tensor, which may be a gradient."""
        mixed = []
        for i, j in enumerate(self.partner):
            if self.box is None:
                mixed.append(self.share * tensor[i] + (1 - self.share) * tensor[j])
            else:
                top, bottom, left, right = self.box
                picture = tensor[i].clone()
                picture[:, top:bottom, left:right] = tensor[j][:, top:bottom, left:right]
                mixed.append(picture)
        return torch.stack(mixed)


@dataclass(frozen=True)
class Step:
    """What one step leaves behind. Gradients and buffers go by the plain module's own names."""

    loss: Tensor
    main_loss: Tensor
    aux_loss: Tensor
    logits: Tensor
    entropy: Tensor
    selected: list[int]
    aux_logits: Tensor
    aux_images: Tensor
    passes: float
    main_gradients: dict[str, Tensor]  # shared parameters (both losses) and main norms (main loss)
    auxiliary_gradients: dict[str, Tensor]  # auxiliary norms (auxiliary loss)
    main_buffers: dict[str, Tensor]
    auxiliary_buffers: dict[str, Tensor]


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Of one sample; the label is a class index or a distribution over the classes."""
    log_probabilities = logits - torch.logsumexp(logits, dim=0)
    if label.ndim == 0:
        return -log_probabilities[int(label)]
    return -sum(p * q for p, q in zip(label, log_probabilities, strict=True))


def entropy(logits: Tensor, label: Tensor) -> float:
    """In nats, of one sample."""
    return -sum(p * math.log(p) for p in _probabilities(logits))


def confidence(logits: Tensor, label: Tensor) -> float:
    """How far the most probable class is from certain, of one sample."""
    return 1 - max(_probabilities(logits))


def margin(logits: Tensor, label: Tensor) -> float:
    """Probability of the best wrong class above that of the true one, of one sample."""
    probabilities = _probabilities(logits)
    true = int(label) if label.ndim == 0 else int(label.argmax())
    return max(p for index, p in enumerate(probabilities) if index != true) - probabilities[true]


def _probabilities(logits: Tensor) -> list[float]:
    weights = [math.exp(value - max(logits.tolist())) for value in logits.tolist()]
    return [weight / sum(weights) for weight in weights]


def count_selected(batch: int, fraction: float) -> int:
    """How many images of a batch go to the auxiliary branch."""
    return min(batch, max(2, math.floor(fraction * batch + 0.5)))


def mean_loss(logits: Tensor, labels: Tensor, others: Tensor, share: float) -> Tensor:
    """Mean over the samples of the two-label loss."""
    total = 0.0
    for row, label, other in zip(logits, labels, others, strict=True):
        total = total + share * cross_entropy(row, label) + (1 - share) * cross_entropy(row, other)
    return total / len(logits)


def perturb(
    start: Tensor,
    now: Tensor,
    gradient: Tensor,
    *,
    epsilon: float,
    step_size: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """One step up the gradient's sign; never further than epsilon from ``start``, nor off the pixel range."""
    moved = torch.empty_like(start)
    for c in range(start.shape[1]):
        black, white = (0 - mean[c]) / std[c], (1 - mean[c]) / std[c]
        delta = now[:, c] - start[:, c] + step_size / std[c] * gradient[:, c].sign()
        delta = delta.clamp(-epsilon / std[c], epsilon / std[c])
        moved[:, c] = (start[:, c] + delta).clamp(black, white)
    return moved


def step(
    module: nn.Module,
    main: dict[str, Tensor],
    auxiliary: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    fraction: float = 0.2,
    attack_steps: int = 1,
    epsilon: float | None = None,
    step_size: float | None = None,
    batch_blend: Blend | None = None,
    auxiliary_blend: Blend | None = None,
    weighting: str = "per_image",
    uncertainty: Callable[[Tensor, Tensor], float] = entropy,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    order: Sequence[int] | None = None,
) -> Step:
    """Gradients, buffers and figures of one step from the given weights, none of which is changed.

    ``main`` is the plain module's whole state; ``auxiliary`` the entries (under the same names) that the
    auxiliary network has of its own; none, and both networks are one. ``order`` lists the selected samples
    as the caller has them, since a blend of the selected samples counts in that order; it must name the
    samples that are selected here.
    """
    module.train()
    parameter_names = {name for name, _ in module.named_parameters()}
    weights = {name: main[name].clone().requires_grad_() for name in parameter_names}
    own = {name: auxiliary[name].clone().requires_grad_() for name in parameter_names & set(auxiliary)}
    main_buffers = {name: tensor.clone() for name, tensor in main.items() if name not in parameter_names}
    auxiliary_buffers = {name: t.clone() for name, t in auxiliary.items() if name not in parameter_names}

    def main_network(pixels: Tensor) -> Tensor:
        return functional_call(module, {**weights, **main_buffers}, (pixels,))

    def auxiliary_network(pixels: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(module, {**weights, **own, **main_buffers, **buffers}, (pixels,))

    batch = len(images)

    # the main pass, on mixed images where the whole batch is mixed
    x, y, other, share = images, labels, labels, 1.0
    if batch_blend is not None:
        x, other, share = batch_blend(images), labels[list(batch_blend.partner)], batch_blend.share
    x = x.clone().requires_grad_()
    logits = main_network(x)
    main_loss = mean_loss(logits, y, other, share)
    names = sorted(weights)
    *from_main, g = torch.autograd.grad(main_loss, [*(weights[name] for name in names), x])

    # selection
    m = count_selected(batch, fraction)
    scores = [uncertainty(logits[i].detach(), y[i]) for i in range(batch)]
    selected = sorted(range(batch), key=lambda i: -scores[i])[:m]
    if order is not None:
        assert sorted(order) == sorted(selected), f"selected {sorted(order)}, expected {sorted(selected)}"
        selected = list(order)
    x_s, g_s, y_s, other_s = x.detach()[selected], g[selected], y[selected], other[selected]
    if auxiliary_blend is not None:
        x_s, g_s = auxiliary_blend(x_s), auxiliary_blend(g_s)
        other_s, share = y_s[list(auxiliary_blend.partner)], auxiliary_blend.share

    # perturbation: the first step takes the main pass's gradient, the others ask the auxiliary network
    if epsilon is None:
        epsilon = 1 / 255 if attack_steps == 1 else (attack_steps + 1) / 255
    if step_size is None:  # 1/255 at the default epsilon
        step_size = epsilon if attack_steps <= 1 else epsilon / (attack_steps + 1)
    limits = {"epsilon": epsilon, "step_size": step_size, "mean": mean, "std": std}
    x_a = x_s
    for attack in range(1, attack_steps + 1):
        if attack > 1:
            x_a = x_a.clone().requires_grad_()
            thrown_away = {name: b.clone() for name, b in {**main_buffers, **auxiliary_buffers}.items()}
            loss = mean_loss(auxiliary_network(x_a, thrown_away), y_s, other_s, share)
            (g_s,) = torch.autograd.grad(loss, [x_a])
        x_a = perturb(x_s, x_a.detach(), g_s, **limits)

    # the auxiliary pass
    weight = {"sum": 1.0, "per_image": m / batch}[weighting]
    aux_logits = auxiliary_network(x_a, auxiliary_buffers)
    aux_loss = mean_loss(aux_logits, y_s, other_s, share)
    shared = [name for name in names if name not in own]
    own_names = sorted(own)
    leaves = [weights[name] for name in shared] + [own[name] for name in own_names]
    gradients = torch.autograd.grad(weight * aux_loss, leaves)
    main_gradients = dict(zip(names, from_main, strict=True))
    for name, gradient in zip(shared, gradients, strict=False):
        main_gradients[name] = main_gradients[name] + gradient

    return Step(
        loss=(main_loss + weight * aux_loss).detach(),
        main_loss=main_loss.detach(),
        aux_loss=aux_loss.detach(),
        logits=logits.detach(),
        entropy=images.new_tensor([entropy(row, label) for row, label in zip(logits, y, strict=True)]),
        selected=selected,
        aux_logits=aux_logits.detach(),
        aux_images=x_a,
        passes=(batch + m * max(attack_steps, 1)) / batch,
        main_gradients=main_gradients,
        auxiliary_gradients=dict(zip(own_names, gradients[len(shared) :], strict=True)),
        main_buffers=main_buffers,
        auxiliary_buffers=auxiliary_buffers,
    )
