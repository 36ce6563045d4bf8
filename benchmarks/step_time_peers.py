"""The loops that people write without this library, for benchmarks/step_time.py to time.

Each peer: how it prepares a plain model (None where it cannot), its step, its passes of the whole batch, and
our method that does the same work, if there is one.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from timm.layers import convert_splitbn_model
from torch import nn

from entprop_wrap.functional.attacks import PGD
from entprop_wrap.methods import AdvProp

EPSILON = 4 / 255
#: The same work as the AdvProp loops below: one attack pass on running statistics, a clean and an adversarial pass.
OURS = AdvProp(PGD(epsilon=EPSILON, steps=1, step_size=EPSILON, random_start=False))


class MixBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that sends a half, or all, of its batch through an auxiliary one.

    As public AdvProp code: tingxueronghua/pytorch-classification-advprop, LiYingwei/ShapeTextureDebiasedTraining.
    """

    def forward(self, batch):
        """Return the normalised batch, by the ``status`` of the layer."""
        if self.status == "adversarial":
            return self.auxiliary(batch)
        clean, adversarial = batch.chunk(2)
        return torch.cat([super().forward(clean), self.auxiliary(adversarial)])


def mix_batch_norms(model):
    """Give every batch norm an auxiliary one; None where there is none."""
    norms = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    for norm in norms:
        norm.auxiliary = copy.deepcopy(norm)
        norm.__class__ = MixBatchNorm2d
    return model if norms else None


def advprop_by_hand(model, images, labels):
    """Attack through the auxiliary norms in evaluation mode, then train both halves in one pass."""

    def status(name):
        for module in model.modules():
            if isinstance(module, MixBatchNorm2d):
                module.status = name

    model.eval()
    status("adversarial")
    hardened = attack(model, images, labels)
    model.train()
    status("mix")
    F.cross_entropy(model(torch.cat([images, hardened])), torch.cat([labels, labels])).backward()


def split_batch_norms(model):
    """Convert with timm; None where there is no batch norm."""
    return convert_splitbn_model(model, 2) if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else None


def advprop_by_timm(model, images, labels):
    """Attack in evaluation mode, in which timm's split norms run their main one, then train both halves in one pass."""
    model.eval()
    hardened = attack(model, images, labels)
    model.train()
    F.cross_entropy(model(torch.cat([images, hardened])), torch.cat([labels, labels])).backward()


def attack(model, images, labels):
    """Take one signed gradient step (FGSM)."""
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels), leaf)
    return (images + EPSILON * gradient.sign()).clamp(0, 1).detach()


def augmix(model, images, labels):
    """Train a clean and two augmented views with the Jensen-Shannon loss; the augmentation itself is the loader's."""
    logits = model(torch.cat([images, images.flip(-1), images.flip(-2)])).chunk(3)
    shares = [part.softmax(1) for part in logits]
    mean = (sum(shares) / 3).clamp(1e-7, 1).log()
    consistency = sum(F.kl_div(mean, share, reduction="batchmean") for share in shares) / 3
    (F.cross_entropy(logits[0], labels) + 12 * consistency).backward()


PEERS = {
    "AdvProp by hand (MixBatchNorm2d)": (mix_batch_norms, advprop_by_hand, 3, OURS),
    "AdvProp with timm's convert_splitbn_model": (split_batch_norms, advprop_by_timm, 3, OURS),
    "AugMix with JSD": (lambda model: model, augmix, 3, None),
}
