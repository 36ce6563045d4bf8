"""EntProp in Lightning: one callback beside a LightningModule as it always was.

    python examples/lightning_loop.py --epochs 20

The checkpoints that Lightning writes hold the plain module; the auxiliary copies resume from them too.
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from entprop_wrap import EntProp
from entprop_wrap.integrations.lightning import EntPropLightningCallback


class Classifier(L.LightningModule):
    """Nothing in here is special."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--output", default="lightning_digits")
options = parser.parse_args()

pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # in [0, 1], so no pixel_space is needed
images = F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
train, test = random_split(TensorDataset(images, torch.tensor(labels)), [1297, 500], torch.Generator().manual_seed(0))

module = Classifier()
trainer = L.Trainer(
    max_epochs=options.epochs,
    gradient_clip_val=1.0,
    callbacks=[EntPropLightningCallback(EntProp(fraction=0.2))],
    default_root_dir=options.output,
    logger=False,
)
trainer.fit(module, DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(test, 500))
print(", ".join(f"{name} {value:.3f}" for name, value in trainer.callback_metrics.items()))

plain = Classifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)  # needs nothing of entprop_wrap
print("keys:", ", ".join(plain.state_dict()))
