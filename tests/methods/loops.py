"""Wrapped toys, their gradients, and counts of their passes, for steps inside other people's loops."""

import functools
import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import entprop_wrap as entprop
from entprop_wrap.methods import Vanilla
from tests.reference.models import build, random_batch

FRACTION = 0.4


class Checkpointed(nn.Module):
    """A model as one checkpoint."""

    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def entprop_method(**options):
    return entprop.EntProp(**{"fraction": FRACTION, "mix": None, **options})


def wrapped(kind="batch_norm", dtype=torch.float64, seed=0, auxiliaries=("aux",)):
    """A wrapped model whose copies differ from its main norms and from each other; always the same one."""
    plain = build(kind, seed=seed, dtype=dtype)
    names = set(plain.state_dict())
    model = entprop.wrap(plain, auxiliaries=auxiliaries)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in names:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_gradients(batch, *, kind="batch_norm", dtype=torch.float64, amp=None, method=None, **options):
    """Gradients of one step in a plain loop, on a fresh model, under autocast to ``amp`` if given."""
    model = wrapped(kind, dtype, auxiliaries=getattr(method, "auxiliaries", ()) or ("aux",))
    with torch.autocast("cpu", amp, enabled=amp is not None):
        entprop.training_step(model, *batch, method=method or entprop_method(**options))
    return gradients(model)


@functools.cache
def distance_under_autocast(kind, amp, size=32):
    """How far autocast alone moves the gradient of an ordinary training step."""
    batch = random_batch(size, dtype=torch.float32)
    full, reduced = (
        plain_gradients(batch, kind=kind, dtype=torch.float32, method=Vanilla(), amp=to) for to in (None, amp)
    )
    return distance(reduced, full)


def assert_close(found, expected, tolerance):
    assert set(found) == set(expected)
    wrong = {}
    for name, wanted in expected.items():
        error = (found[name] - wanted).norm().item() / max(wanted.norm().item(), 1e-4)
        if not error <= tolerance:
            wrong[name] = error
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def distance(found, expected):
    """Relative distance of two whole gradients."""
    assert set(found) == set(expected)
    apart = sum((found[name].double() - wanted.double()).square().sum() for name, wanted in expected.items())
    return math.sqrt(apart / sum(wanted.double().square().sum() for wanted in expected.values()))


class _Counted(torch.autograd.Function):
    """The identity; writes down the batch size of each backward pass."""

    @staticmethod
    def forward(context, tensor, log):
        context.log = log
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context, gradient):
        context.log.append(len(gradient))
        return gradient, None


class Counter:
    """Batch sizes of the forward and backward passes through a model, and of the calls of ``backward``."""

    def __init__(self, model):
        self.forwards, self.backwards, self.calls = [], [], 0
        model.register_forward_pre_hook(lambda module, args: self.forwards.append(len(args[0])))
        model.register_forward_hook(lambda module, args, output: _Counted.apply(output, self.backwards))

    def backward(self, loss):
        self.calls += 1
        loss.backward()
