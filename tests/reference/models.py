"""Toy classifiers for 3x8x8 images and five classes, one for each kind of norm layer.

All are deterministic (no dropout) and mostly smooth: where an activation is flat, the sign of an input
gradient is a matter of rounding.
"""

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)  # on tensors this small, threads only wait for one another

CLASSES = 5
SIZE = 8
CHANNELS = 3


class BatchNormNet(nn.Module):
    """A small CNN with two BatchNorm2d layers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8, momentum=0.3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, pixels):
        hidden = F.softplus(self.bn1(self.conv1(pixels)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        return self.fc(hidden.mean((2, 3)))


class LayerNormNet(nn.Module):
    """A ViT of one block: patches, attention with one head, an MLP, and three LayerNorms."""

    def __init__(self, width=8, patch=4):
        super().__init__()
        self.patch = nn.Conv2d(CHANNELS, width, patch, stride=patch)
        self.position = nn.Parameter(0.1 * torch.randn((SIZE // patch) ** 2, width))
        self.before_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixels):
        tokens = self.patch(pixels).flatten(2).transpose(1, 2) + self.position
        query, key, value = self.qkv(self.before_attention(tokens)).chunk(3, dim=-1)
        weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
        tokens = tokens + self.project(weights @ value)
        tokens = tokens + self.mlp(self.before_mlp(tokens))
        return self.head(self.last(tokens).mean(1))


class GroupNormNet(nn.Module):
    """A small CNN with GroupNorms, one of which has a single group."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, 6, 3, padding=1)
        self.gn1 = nn.GroupNorm(3, 6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.gn2 = nn.GroupNorm(1, 8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, pixels):
        hidden = F.silu(self.gn1(self.conv1(pixels)))
        hidden = F.silu(self.gn2(self.conv2(hidden)))
        return self.fc(hidden.mean((2, 3)))


class MixedNet(nn.Module):
    """BatchNorm and LayerNorm in one net, with the rarer BatchNorms.

    One averages cumulatively (``momentum=None``), one has no affine parameters, one sits behind the pooling.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6, momentum=None)
        self.block = nn.ModuleDict(
            {
                "depthwise": nn.Conv2d(6, 6, 3, padding=1, groups=6),
                "norm": nn.LayerNorm(6),
                "pointwise": nn.Linear(6, 6),
                "bn": nn.BatchNorm2d(6, affine=False),
            }
        )
        self.bn2 = nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.LayerNorm(6, bias=False), nn.Linear(6, CLASSES))

    def forward(self, pixels):
        hidden = torch.tanh(self.bn1(self.conv1(pixels)))
        inner = self.block["depthwise"](hidden).permute(0, 2, 3, 1)
        inner = F.gelu(self.block["pointwise"](self.block["norm"](inner))).permute(0, 3, 1, 2)
        hidden = self.block["bn"](hidden + inner)
        return self.head(self.bn2(hidden.square().mean((2, 3))))


MODELS = {
    "batch_norm": BatchNormNet,
    "layer_norm": LayerNormNet,
    "group_norm": GroupNormNet,
    "mixed_norms": MixedNet,
}
HEADS = {
    "batch_norm": "fc.weight",
    "layer_norm": "head.weight",
    "group_norm": "fc.weight",
    "mixed_norms": "head.1.weight",
}
SHARPNESS = {"batch_norm": 10.0, "layer_norm": 3.0, "group_norm": 20.0, "mixed_norms": 3.0}


def build(kind, *, seed=0, dtype=torch.float64):
    """One of ``MODELS``, in training mode, norm parameters and statistics far from their defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[kind]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                shift_statistics(name, buffer)
            model.get_parameter(HEADS[kind]).mul_(SHARPNESS[kind])  # confident enough for the entropies to differ
    return model.to(dtype).train()


def shift_statistics(name, buffer):
    """Move a BatchNorm buffer somewhere plausible that is not where it started."""
    if name.endswith("num_batches_tracked"):
        buffer.add_(3)
    elif name.endswith("running_var"):
        buffer.mul_(torch.exp(0.3 * torch.randn_like(buffer)))
    else:
        buffer.add_(0.3 * torch.randn_like(buffer))


def random_batch(size, *, seed=0, soft=False, dtype=torch.float64):
    """Images in [0, 1], some pixels at its very ends, and labels: integers or distributions."""
    generator = torch.Generator().manual_seed(1000 + seed)
    images = torch.rand(size, CHANNELS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    images = (1.4 * images - 0.2).clamp(0, 1).to(dtype)
    if soft:
        scores = 2 * torch.randn(size, CLASSES, generator=generator, dtype=torch.float64)
        return images, scores.softmax(1).to(dtype)
    return images, torch.randint(CLASSES, (size,), generator=generator)
