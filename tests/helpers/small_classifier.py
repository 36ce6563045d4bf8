"""A small classifier that reacts to its images, and data for it."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from entprop_wrap import PixelSpace

CLASSES = 5
SPACE = PixelSpace((0.5, 0.45, 0.4), (0.25, 0.2, 0.3))


def classifier(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(72, CLASSES)
    )
    with torch.no_grad():
        model[1].running_mean.normal_(0, 0.1)
        model[-1].weight.mul_(4)
    return model.eval()


def pixels(count, side=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, side, mode="bilinear").clamp(0, 1)


def dataset(count=11, space=SPACE, **options):
    raw = pixels(count, **options)
    labels = torch.arange(count).mul(7).remainder(CLASSES)
    return TensorDataset((raw - _of(space.mean)) / _of(space.std), labels)


def loader(count=11, batch_size=4, space=SPACE, **options):
    return DataLoader(dataset(count, space, **options), batch_size=batch_size)


def _of(values):
    return torch.tensor(values).view(1, -1, 1, 1)
