"""EntProp by hand, in a plain float32 loop; nothing of the package's step. And what both integrations are tested with.

The auxiliary model is a deep copy that shares every parameter except those of the norm layers.
"""

from __future__ import annotations

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import nn

from entprop_wrap import MixUp, PixelSpace

CLASSES = 5
SPACE = PixelSpace((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))


def pixels(number: int = 22) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in SPACE with labels."""
    raw = torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (SPACE.mean, SPACE.std))
    return (raw - mean) / std, torch.arange(number) % CLASSES


class RecordingMixer:
    """MixUp that remembers its draws."""

    def __init__(self) -> None:
        self.draws = []

    def draw(self, shape, generator):
        self.draws.append(MixUp(1.0).draw(shape, generator))
        return self.draws[-1]


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with norms of its own and everything else shared."""
    other = copy.deepcopy(model)
    for name, module in model.named_modules():
        if "Norm" not in type(module).__name__:
            other.get_submodule(name)._parameters = module._parameters
    return other


def train_by_hand(
    model,
    steps,
    logits_of,
    *,
    prefix="",
    fraction=0.5,
    draws=None,
    clip=0.0,
    smoothing=0.0,
    precision=contextlib.nullcontext,
    scale=1.0,
    lr=0.01,
):
    """Train ``model`` by plain SGD on ``steps``, lists of ``(images, labels, weight of the loss)``.

    Return the gradients of each step, by the names of a wrapped model, and the auxiliary model.
    """
    other = shared_copy(model)
    names = {id(p): prefix + n for n, p in model.named_parameters()}
    for n, p in other.named_parameters():
        names.setdefault(id(p), prefix + ".entprop_aux.".join(n.rsplit(".", 1)))
    parameters = list({p: None for net in (model, other) for p in net.parameters()})
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (SPACE.mean, SPACE.std))
    low, high = (0 - mean) / std, (1 - mean) / std
    draws, gradients = iter(draws or ()), []
    model.train()
    other.train()
    for step in steps:
        for p in parameters:
            p.grad = None
        for x, y, w in step:
            draw = next(draws, None)
            partner, share = (torch.arange(len(y)), 1.0) if draw is None else (draw.partner, draw.share)
            x = (x if draw is None else share * x + (1 - share) * x[partner]).requires_grad_()

            def loss_of(logits, rows, y=y, partner=partner, share=share):
                a = F.cross_entropy(logits, y[rows], label_smoothing=smoothing)
                b = F.cross_entropy(logits, y[partner][rows], label_smoothing=smoothing)
                return a if share == 1 else share * a + (1 - share) * b

            with precision():
                logits = logits_of(model, x).float()
            (w * loss_of(logits, slice(None)) * scale).backward()
            number = max(2, int(fraction * len(y) + 0.5))
            p = logits.detach().softmax(-1)
            rows = (-(p * p.log()).sum(-1)).argsort(descending=True, stable=True)[:number]
            hard = (x.detach() + x.grad.sign() / 255 / std)[rows].clamp(low, high)
            with precision():
                logits = logits_of(other, hard).float()
            (w * number / len(y) * loss_of(logits, rows) * scale).backward()
        trained = [p for p in parameters if p.grad is not None]
        for p in trained:
            p.grad /= scale
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        gradients.append({names[id(p)]: p.grad.clone() for p in trained})
        with torch.no_grad():
            for p in trained:
                p -= lr * p.grad
    return gradients, other


def worst(found: list[dict], expected: list[dict]) -> float:
    """The largest relative difference of the gradients of any step; 0 is equal bit for bit."""
    assert [set(step) for step in found] == [set(step) for step in expected]
    result = 0.0
    for a, b in zip(found, expected, strict=True):
        size = torch.cat([v.flatten() for v in b.values()]).norm()
        result = max(result, *(float((a[n] - b[n]).norm() / (b[n].norm() + 1e-3 * size)) for n in b))
    return result
