"""A LightningModule as users write them, and EntProp by hand in a plain loop; nothing of the package's step.

The auxiliary model is a deep copy that shares every parameter except those of the norm layers.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from entprop_wrap import MixUp, PixelSpace

CLASSES = 5
SPACE = PixelSpace((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
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

    def __init__(self, model=None, optimizer=torch.optim.SGD, lr=0.01) -> None:
        super().__init__()
        self.model = net() if model is None else model
        self.optimizer, self.lr = optimizer, lr
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


class RecordingMixer:
    """MixUp that remembers its draws."""

    def __init__(self) -> None:
        self.draws = []

    def draw(self, shape, generator):
        self.draws.append(MixUp(1.0).draw(shape, generator))
        return self.draws[-1]


def images(number: int = 22):
    """Images in SPACE with labels."""
    pixels = torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (SPACE.mean, SPACE.std))
    return (pixels - mean) / std, torch.arange(number) % CLASSES


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


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with norms of its own and everything else shared."""
    other = copy.deepcopy(model)
    for name, module in model.named_modules():
        if "Norm" not in type(module).__name__:
            other.get_submodule(name)._parameters = module._parameters
    return other


def by_hand(
    model,
    batches,
    *,
    accumulate=1,
    draws=None,
    clip=0.0,
    amp=None,
    scale=1.0,
    fraction=0.5,
    prefix="model.",
    smoothing=0.0,
    epochs=1,
    lr=0.01,
):
    """Train ``model`` by plain SGD; return gradients of each step, by the names of a wrapped model, and the copy."""
    other = shared_copy(model)
    names = {id(p): prefix + n for n, p in model.named_parameters()}
    for n, p in other.named_parameters():
        names.setdefault(id(p), prefix + ".entprop_aux.".join(n.rsplit(".", 1)))
    parameters = list({p: None for net_ in (model, other) for p in net_.parameters()})
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (SPACE.mean, SPACE.std))
    draws = iter(draws or ())
    precision = torch.autocast("cpu", amp) if amp else contextlib.nullcontext()
    steps = []
    model.train()
    other.train()
    batches = list(batches)
    for _ in range(epochs):
        for index, (x, y) in enumerate(batches):
            if index % accumulate == 0:
                for p in parameters:
                    p.grad = None
            draw = next(draws, None)
            partner, share = (torch.arange(len(y)), 1.0) if draw is None else (draw.partner, draw.share)
            x = (x if draw is None else share * x + (1 - share) * x[partner]).requires_grad_()

            def loss_of(logits, rows, y=y, partner=partner, share=share):
                a = F.cross_entropy(logits, y[rows], label_smoothing=smoothing)
                b = F.cross_entropy(logits, y[partner][rows], label_smoothing=smoothing)
                return a if share == 1 else share * a + (1 - share) * b

            with precision:
                logits = model(x).float()
                loss = loss_of(logits, slice(None))
            (loss / accumulate * scale).backward()
            number = max(2, int(fraction * len(y) + 0.5))
            p = logits.detach().softmax(-1)
            rows = (-(p * p.log()).sum(-1)).argsort(descending=True, stable=True)[:number]
            low, high = (0 - mean) / std, (1 - mean) / std
            hard = (x.detach() + x.grad.sign() / 255 / std)[rows].clamp(low, high)
            with precision:
                loss = loss_of(other(hard).float(), rows)
            (number / len(y) * loss / accumulate * scale).backward()
            if (index + 1) % accumulate and index + 1 < len(batches):
                continue
            for p in parameters:
                p.grad = p.grad / scale
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            steps.append({names[id(p)]: p.grad.clone() for p in parameters})
            with torch.no_grad():
                for p in parameters:
                    p -= lr * p.grad
    return steps, other


def worst(found: list[dict], expected: list[dict]) -> float:
    """The largest relative difference of the gradients of any step; 0 is equal bit for bit."""
    assert [set(step) for step in found] == [set(step) for step in expected]
    differences = [
        float((a[n] - b[n]).norm() / b[n].norm()) if not torch.equal(a[n], b[n]) else 0.0
        for a, b in zip(found, expected, strict=True)
        for n in b
    ]
    return max(differences)
