"""A small wrapped model, a batch for it, and whether a step has left a trace."""

import torch

import entprop_wrap as entprop
from tests.helpers.trainer_toys import BatchNormNet, make

IMAGES, LABELS = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4


def ready(net=BatchNormNet, auxiliaries=("aux",), **options):
    return entprop.wrap(make(net, **options), auxiliaries=auxiliaries).train()


def state(model):
    """Weights, buffers and gradients."""
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {name: None if x is None else x.clone() for name, x in (model.state_dict() | gradients).items()}


def same(model, before):
    return all(
        (value is None) == (before[name] is None) and (value is None or torch.equal(value, before[name]))
        for name, value in state(model).items()
    )
