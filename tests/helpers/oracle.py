"""What the switch must compute, computed without it: the unwrapped model, run by ``torch.func`` on clones of tensors.

The copies are perturbed first. Copies equal to the main norms would hide every error in a net of layer norms.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import entprop_wrap as entprop
from entprop_wrap.wrapping.state_dict import auxiliary_names
from tests.helpers.architectures import CLASSES, logits_of


@dataclass
class Pass:
    """Everything one forward and backward produced, under the plain model's names."""

    logits: Tensor
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def perturb(model: nn.Module, seed: int = 7) -> None:
    """Move every auxiliary copy away from the main norms, and the main norms from their initial values."""
    generator, copies = torch.Generator().manual_seed(seed), auxiliary_names(model)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in copies and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator).to(tensor)
                tensor.mul_(1 + 0.3 * noise).add_(0.2 * noise)


def auxiliary_tensors(model: nn.Module, auxiliary: str = "aux") -> dict[str, Tensor]:
    """Return clones of one auxiliary's tensors, under the names of what they are copies of."""
    tensors, originals = {}, auxiliary_names(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in originals and f"entprop_{auxiliary}" in name.split("."):
            clone = tensor.detach().clone()
            tensors[originals[name]] = clone.requires_grad_(tensor.requires_grad)
    return tensors


def labels_for(images: Tensor) -> Tensor:
    return torch.arange(len(images)) % CLASSES


def loss_of(output: object, images: Tensor) -> Tensor:
    logits = logits_of(output)
    return F.cross_entropy(logits, labels_for(images)) + 0.1 * logits.square().mean()


def expected_pass(plain: nn.Module, images: Tensor, tensors: dict[str, Tensor] | None = None, seed: int = 3) -> Pass:
    """Run the unwrapped ``plain`` on ``tensors`` in place of its own (None: its own), and return the outcome."""
    own = {
        name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]
    }
    run = {**own, **(tensors or {})}
    torch.manual_seed(seed)
    output = functional_call(plain, run, (images,))
    loss_of(output, images).backward()
    gradients = {name: run[name].grad for name, _ in plain.named_parameters()}
    return Pass(logits_of(output).detach(), gradients, {name: run[name] for name, _ in plain.named_buffers()})


def observed_pass(model: nn.Module, output: object, auxiliary: str | None = "aux") -> Pass:
    """Read off a wrapped model what a pass in ``auxiliary`` that gave ``output`` has left behind."""
    prefix, originals = f"entprop_{auxiliary}", auxiliary_names(model)
    mine: dict[str, dict[str, Tensor | None]] = {"gradients": {}, "buffers": {}}
    for kind, named in (("gradients", model.named_parameters()), ("buffers", model.named_buffers())):
        for name, tensor in named:
            if name not in originals:
                mine[kind].setdefault(name, tensor)
            elif prefix in name.split("."):
                mine[kind][originals[name]] = tensor
    gradients = {name: tensor.grad for name, tensor in mine["gradients"].items()}
    return Pass(logits_of(output).detach(), gradients, mine["buffers"])


def assert_pass(model: nn.Module, plain: nn.Module, images: Tensor, auxiliary: str | None = "aux") -> None:
    """Compare a pass of a wrapped model in one domain with one of the unwrapped model on that domain's tensors."""
    expected = expected_pass(plain, images, None if auxiliary is None else auxiliary_tensors(model, auxiliary))
    model.zero_grad()
    with entprop.auxiliary(model, auxiliary):
        output = model(images)
        loss_of(output, images).backward()
    assert_same(observed_pass(model, output, auxiliary), expected)


def assert_same(found: Pass, expected: Pass, tolerance: float = 1e-6) -> None:
    """Compare outputs, gradients and buffers, and report every difference at once."""
    problems = []
    _compare("logits", found.logits, expected.logits, tolerance, problems)
    for kind in ("gradients", "buffers"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        if ours.keys() != theirs.keys():
            problems.append(f"{kind}: {sorted(ours.keys() ^ theirs.keys())} on one side only")
            continue
        for name in theirs:
            _compare(f"{kind} {name}", ours[name], theirs[name], tolerance, problems)
    assert not problems, "\n".join(problems)


def _compare(what: str, found: Tensor | None, expected: Tensor | None, tolerance: float, problems: list[str]) -> None:
    if (found is None) != (expected is None):
        problems.append(f"{what}: found {'none' if found is None else 'one'}, expected the opposite")
    elif found is not None and expected is not None:
        scale = expected.double().abs().max().item() if expected.numel() else 0.0
        error = (found.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        if not error <= tolerance * max(1.0, scale):
            problems.append(f"{what}: off by {error:.2e} at scale {scale:.2e}")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return clones of every tensor of a model's state, by name."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that are no longer bitwise what they were."""
    return {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
