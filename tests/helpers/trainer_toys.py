"""Small nets and separable images. Nothing here needs entprop_wrap: exported models load with it alone."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

CLASSES = 4


class BatchNormNet(nn.Module):
    """Conv, BatchNorm, dropout, linear: statistics and randomness in the model."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, pixels):
        hidden = torch.relu(self.bn(self.conv(pixels)))
        return self.fc(self.dropout(hidden.mean((2, 3))))


class GroupNormNet(nn.Module):
    """No statistics and no randomness: batches may be split without changing the gradient."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, pixels):
        return self.fc(torch.nn.functional.silu(self.norm(self.conv(pixels))).mean((2, 3)))


def make(net, **options):
    torch.manual_seed(7)
    return net(**options)


class Images(Dataset):
    """Images of one colour per class, in noise. Augmented with all three libraries' random numbers on request."""

    def __init__(self, number=40, *, augment=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(number) % CLASSES
        colours = torch.tensor([[0.8, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.2, 0.8], [0.7, 0.7, 0.2]])
        noise = 0.4 * torch.rand(number, 3, 8, 8, generator=generator) - 0.2
        self.images = colours[self.labels].view(-1, 3, 1, 1) + noise
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.augment:
            image = image + 0.05 * (random.random() + np.random.rand() + torch.rand(1) - 1.5)  # noqa: NPY002
        return image.clamp(0, 1), int(self.labels[index])


def tiny_vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(7)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
            num_labels=CLASSES,
        )
    )
