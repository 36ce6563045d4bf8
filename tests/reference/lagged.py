"""One lagged EntProp step, written to be obviously right: the fresh batch and what came back, in two passes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference.entprop import count_selected, entropy, mean_loss, perturb


@dataclass(frozen=True)
class Waiting:
    """What one step leaves for the next."""

    images: Tensor
    labels: Tensor
    others: Tensor
    share: float


@dataclass(frozen=True)
class Step:
    """What one step leaves behind, under the plain module's own names."""

    loss: Tensor
    main_gradients: dict[str, Tensor]
    auxiliary_gradients: dict[str, Tensor]
    main_buffers: dict[str, Tensor]
    auxiliary_buffers: dict[str, Tensor]
    selected: list[int]
    waiting: Waiting


def step(
    module: nn.Module,
    main: dict[str, Tensor],
    auxiliary: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    waiting: Waiting | None,
    *,
    fraction: float,
    epsilon: float,
    blend=None,
    equal_budget: bool = False,
) -> Step:
    """Gradients and buffers of one step from the given weights, none of which is changed."""
    module.train()
    parameters = {name for name, _ in module.named_parameters()}
    weights = {name: main[name].clone().requires_grad_() for name in parameters}
    own = {name: auxiliary[name].clone().requires_grad_() for name in parameters & set(auxiliary)}
    main_buffers = {name: tensor.clone() for name, tensor in main.items() if name not in parameters}
    auxiliary_buffers = {name: tensor.clone() for name, tensor in auxiliary.items() if name not in parameters}

    batch, back = len(images), 0 if waiting is None else len(waiting.images)
    fresh = batch - back if equal_budget else batch
    x, y = images[:fresh], labels[:fresh]
    other, share = y, 1.0
    if blend is not None:
        x, other, share = blend(x), y[list(blend.partner)], blend.share
    x = x.clone().requires_grad_()

    logits = functional_call(module, {**weights, **main_buffers}, (x,))
    main_loss = mean_loss(logits, y, other, share)
    loss = main_loss
    if waiting is not None:
        hard = functional_call(module, {**weights, **own, **main_buffers, **auxiliary_buffers}, (waiting.images,))
        aux_loss = mean_loss(hard, waiting.labels, waiting.others, waiting.share)
        loss = (fresh / batch if equal_budget else 1.0) * main_loss + back / batch * aux_loss
    (g,) = torch.autograd.grad(main_loss, [x], retain_graph=True)
    names, own_names = sorted(weights), sorted(own)
    leaves = [*(weights[name] for name in names), *(own[name] for name in own_names)]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = [torch.zeros_like(a) if b is None else b for a, b in zip(leaves, gradients, strict=True)]

    scores = [entropy(row.detach(), label) for row, label in zip(logits, y, strict=True)]
    selected = sorted(range(fresh), key=lambda i: -scores[i])[: count_selected(batch, fraction)]
    start = x.detach()[selected]
    hardened = perturb(start, start, g[selected], epsilon=epsilon, step_size=epsilon, mean=(0.0,) * 3, std=(1.0,) * 3)
    return Step(
        loss=loss.detach(),
        main_gradients=dict(zip(names, found[: len(names)], strict=True)),
        auxiliary_gradients=dict(zip(own_names, found[len(names) :], strict=True)),
        main_buffers=main_buffers,
        auxiliary_buffers=auxiliary_buffers,
        selected=selected,
        waiting=Waiting(hardened, y[selected], other[selected], share),
    )
