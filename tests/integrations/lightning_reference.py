"""A LightningModule as users write them, and EntProp by hand in a plain loop."""

from __future__ import annotations

import functools
import logging
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.integrations.by_hand import CLASSES, SPACE, RecordingMixer, pixels, train_by_hand, worst

__all__ = ["CLASSES", "SPACE", "RecordingMixer", "worst"]

images = pixels
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Net(nn.Module):
    """Two kinds of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.ln = nn.LayerNorm(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.ln(F.relu(self.bn(self.conv(x))).mean((2, 3))))


def net() -> Net:
    """Always the same net, with norms that are not trivial."""
    torch.manual_seed(3)
    model = Net()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


class Classifier(L.LightningModule):
    """What a user has. ``gradients`` remembers gradients before each optimizer step, after clipping."""

    def __init__(self, model=None, optimizer=None, lr=0.01) -> None:
        super().__init__()
        self.model = net() if model is None else model
        self.optimizer, self.lr = optimizer or torch.optim.SGD, lr
        self.gradients, self.after_backward, self.evaluated = [], 0, []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("train_loss", loss, on_step=True)
        return loss

    def evaluate(self, batch):
        images, labels = batch
        logits = self.model(images)
        self.evaluated.append(logits)
        self.log("loss", F.cross_entropy(logits, labels))

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch)

    def test_step(self, batch, batch_idx):
        self.evaluate(batch)

    def on_after_backward(self):
        self.after_backward += 1

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.gradients.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


def loader(number: int = 22, batch_size: int = 4) -> DataLoader:
    """Batches of 4, the last one of 2, in a fixed order."""
    return DataLoader(TensorDataset(*images(number)), batch_size=batch_size)


class Batches:
    """Batches as they are; a list would be taken for several loaders."""

    def __init__(self, batches) -> None:
        self.batches = list(batches)

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def trainer(*callbacks, folder=None, **options) -> L.Trainer:
    """A quiet Trainer on the CPU, which writes only if it has a folder."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": folder is not None,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def by_hand(model, batches, *, accumulate=1, amp=None, prefix="model.", epochs=1, **options):
    """Train ``model`` by plain SGD; return gradients of each step, by the names of a wrapped model, and the copy."""
    batches = [(x, y, 1 / accumulate) for x, y in batches]
    steps = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)] * epochs
    if amp:
        options["precision"] = functools.partial(torch.autocast, "cpu", amp)
    return train_by_hand(model, steps, lambda net, x: net(x), prefix=prefix, **options)
