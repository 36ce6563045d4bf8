"""Small models in evaluation mode, wrapped with copies that differ, and data; and how to tell that nothing changed."""

import copy
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, TensorDataset

import entprop_wrap as entprop
from entprop_wrap import PixelSpace
from tests.reference.models import CLASSES, BatchNormNet, LayerNormNet

SPACE = PixelSpace((0.5, 0.45, 0.4), (0.25, 0.2, 0.3))
NETS = {"bn": BatchNormNet, "ln": LayerNormNet}


def make(net="bn", *, wrapped=True, dtype=torch.float64):
    torch.manual_seed(3)
    model = NETS[net]().to(dtype)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    if wrapped:
        entprop.wrap(model)
        for name, tensor in model.state_dict().items():
            if "entprop_" in name and tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand_like(tensor))
    return model.eval()


def images(count=24, side=8, seed=5, dtype=torch.float64):
    pixels = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (SPACE.mean, SPACE.std))
    return ((pixels - mean) / std).to(dtype)


def loader(count=24, batch_size=8, **options):
    return DataLoader(TensorDataset(images(count, **options), torch.arange(count) % CLASSES), batch_size=batch_size)


@contextmanager
def untouched(model):
    """Weights, buffers, gradients, modes, hooks and torch's random state are the same afterwards."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    yield
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert modes == [module.training for module in model.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), random)
