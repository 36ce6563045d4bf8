"""Toy nets for the switch: small enough to compile, to checkpoint and to start in a second process."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A residual block with one norm of each of two kinds."""

    def __init__(self, width: int, norm: str = "layer") -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width)
        self.outer = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.outer(self.inner(x).square() + x)))


class Toy(nn.Module):
    """Rows of eight numbers to five classes.

    ``mode`` is how its blocks are checkpointed: "none", "plain" (not reentrant), "reentrant", or "nested" (reentrant
    within reentrant).
    """

    def __init__(self, norm: str = "layer", mode: str = "none", depth: int = 2, width: int = 8) -> None:
        super().__init__()
        self.mode = mode
        self.stem = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width, norm) for _ in range(depth))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def _blocks(self, x):
        for block in self.blocks:
            if self.mode == "none":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.mode != "plain")
        return x

    def forward(self, rows):
        x = self.stem(rows)
        x = checkpoint(self._blocks, x, use_reentrant=True) if self.mode == "nested" else self._blocks(x)
        return self.head(self.last(x))


class Named(nn.Module):
    """A net whose own parts have names like those of copies."""

    def __init__(self):
        super().__init__()
        self.entprop_backbone = nn.Linear(8, 8)
        self.entprop_norm = nn.BatchNorm1d(8)
        self.entprop_scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 5)

    def forward(self, rows):
        return self.head(self.entprop_norm(self.entprop_backbone(rows)) * self.entprop_scale)


def toy(norm: str = "layer", mode: str = "none", seed: int = 0, **options) -> Toy:
    """Return a toy with the weights that ``seed`` gives."""
    torch.manual_seed(seed)
    return Toy(norm, mode, **options)


def rows(count: int = 6, seed: int = 1) -> torch.Tensor:
    """Return a batch for a toy."""
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
