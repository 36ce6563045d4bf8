"""What the references of all methods but EntProp share: networks as functions of given weights, PGD, and the outcome.

As in ``entprop.py`` nothing is wrapped. There are two complete sets of weights, the main network's and the auxiliary
network's, equal but for the norms, and a plain module that is only ever called with weights handed to it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference.entprop import cross_entropy, perturb


@dataclass(frozen=True)
class Outcome:
    """What one step leaves behind. Gradients and buffers go by the plain module's own names."""

    loss: Tensor
    main_loss: Tensor
    logits: Tensor
    aux_loss: Tensor | None
    aux_logits: Tensor | None
    aux_images: Tensor | None
    passes: float
    main_gradients: dict[str, Tensor]
    auxiliary_gradients: dict[str, Tensor]
    main_buffers: dict[str, Tensor]
    auxiliary_buffers: dict[str, Tensor]


class Networks:
    """The main and the auxiliary network, from copies of the given weights, and a count of the images passed."""

    def __init__(self, module: nn.Module, main: dict[str, Tensor], auxiliary: dict[str, Tensor]) -> None:
        self.module, self.images_passed = module, 0
        parameters = {name for name, _ in module.named_parameters()}
        self.weights = {name: main[name].clone().requires_grad_() for name in sorted(parameters)}
        self.own = {name: auxiliary[name].clone().requires_grad_() for name in sorted(parameters & set(auxiliary))}
        self.main_buffers = {name: t.clone() for name, t in main.items() if name not in parameters}
        self.auxiliary_buffers = {name: t.clone() for name, t in auxiliary.items() if name not in parameters}

    def main(self, pixels: Tensor, statistics: str = "recorded") -> Tensor:
        """Logits of the main network; see ``_run`` for ``statistics``."""
        return self._run(pixels, self.weights, self.main_buffers, {}, statistics)

    def auxiliary(self, pixels: Tensor, statistics: str = "recorded") -> Tensor:
        """Logits of the auxiliary network."""
        return self._run(pixels, {**self.weights, **self.own}, self.auxiliary_buffers, self.main_buffers, statistics)

    def _run(self, pixels, weights, buffers, others, statistics):
        """Normalise with the batch, and record it ("recorded") or not ("batch"), or with the records ("running")."""
        if torch.is_grad_enabled():  # a forward without a backward is not counted as a pass
            self.images_passed += len(pixels)
        if statistics != "recorded":
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        self.module.train(statistics != "running")
        try:
            return functional_call(self.module, {**others, **weights, **buffers}, (pixels,))
        finally:
            self.module.train()

    def gradients(self, loss: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of the main network's parameters, and of those that the auxiliary network has of its own."""
        names = [(self.weights, name) for name in self.weights] + [(self.own, name) for name in self.own]
        leaves = [group[name] for group, name in names]
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        found = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
        count = len(self.weights)
        return dict(zip(self.weights, found[:count], strict=True)), dict(zip(self.own, found[count:], strict=True))

    def outcome(self, batch: int, gradients: tuple[dict, dict], **figures: Tensor | None) -> Outcome:
        """Collect the outcome of a step on ``batch`` images."""
        return Outcome(
            **{name: value.detach() if isinstance(value, Tensor) else value for name, value in figures.items()},
            passes=self.images_passed / batch,
            main_gradients=gradients[0],
            auxiliary_gradients=gradients[1],
            main_buffers=self.main_buffers,
            auxiliary_buffers=self.auxiliary_buffers,
        )


def pgd(
    start: Tensor,
    images: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    steps: int,
    epsilon: float,
    step_size: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Move from ``start`` to where ``objective(pixels)`` is larger, within ``epsilon`` of ``images``."""
    now = start
    for _ in range(steps):
        now = now.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(now), [now])
        now = perturb(images, now.detach(), gradient, epsilon=epsilon, step_size=step_size, mean=mean, std=std)
    return now.detach()


def one_hot(label: Tensor, classes: int) -> Tensor:
    """A label as a distribution over the classes, which soft labels are already."""
    if label.ndim == 1:
        return label
    distribution = torch.zeros(classes, dtype=torch.float64)
    distribution[int(label)] = 1.0
    return distribution


def mean_loss(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0, entropy_weight: float = 0.0) -> Tensor:
    """Mean over the samples of the cross-entropy with smoothed labels, less the weighted entropy."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        uniform = torch.full_like(row, 1 / len(row))
        total = total + cross_entropy(row, (1 - smoothing) * one_hot(label, len(row)) + smoothing * uniform)
        total = total - entropy_weight * entropy(row)
    return total / len(logits)


def entropy(row: Tensor) -> Tensor:
    """Of one sample, in nats, differentiable."""
    log_p = row - torch.logsumexp(row, dim=0)
    return -sum(lp.exp() * lp for lp in log_p)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Mean over the samples of KL(softmax first || softmax second)."""
    total = 0.0
    for p_row, q_row in zip(first, second, strict=True):
        log_p, log_q = p_row - torch.logsumexp(p_row, dim=0), q_row - torch.logsumexp(q_row, dim=0)
        total = total + sum(p.exp() * (p - q) for p, q in zip(log_p, log_q, strict=True))
    return total / len(first)


def count(batch: int, fraction: float) -> int:
    """How many images a fraction of the batch is."""
    return min(batch, max(2, math.floor(fraction * batch + 0.5)))
