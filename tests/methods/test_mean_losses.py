"""A loss that is not a mean over images raises in the first step of a model, before anything has changed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import PGD
from entprop_wrap.functional.losses import mean_by_construction
from entprop_wrap.methods import MEADA, AdversarialTraining, AdvProp, EntProp, EntropyAscent, FastAdvProp, Vanilla
from tests.helpers.traceless import IMAGES, LABELS, ready, same, state

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

METHODS = {
    "entprop": EntProp(fraction=0.5),
    "advprop": AdvProp(PGD(steps=1)),
    "fast_advprop": FastAdvProp(fraction=0.5),
    "meada": MEADA(EntropyAscent(steps=1)),
    "pgd": AdversarialTraining(PGD(steps=1)),
    "trades": AdversarialTraining(PGD(steps=1), kind="trades"),
    "smoothed": Vanilla(label_smoothing=0.1),
}
SUMS = {
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "over_a_constant": lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum") / 12,
    "soft": lambda logits, labels: -(labels * logits.log_softmax(-1)).sum(),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_what_is_no_mean_raises_and_leaves_no_trace(name, reduction):
    model = ready()
    before = state(model)
    with pytest.raises(ConfigurationError, match=f"reduction='{'mean' if reduction == 'sum' else 'none'}'"):
        entprop.training_step(
            model, IMAGES, LABELS, method=METHODS[name], loss=nn.CrossEntropyLoss(reduction=reduction)
        )
    assert same(model, before)
    entprop.training_step(model, IMAGES, LABELS, method=METHODS[name])


@pytest.mark.parametrize("loss", SUMS)
def test_sums_in_other_clothes(loss):
    labels = F.one_hot(LABELS, 4).float() if loss == "soft" else LABELS
    with pytest.raises(ConfigurationError, match="Write reduction='mean'"):
        entprop.training_step(ready(), IMAGES, labels, method=EntProp(fraction=0.5), loss=SUMS[loss])


class Counting(nn.Module):
    """Draws, counts its calls, and keeps a mean: what a further call must not be seen by."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, logits, labels):
        self.calls += 1
        self.seen += len(logits)
        noise = 1e-3 * torch.rand(len(logits))
        return (F.cross_entropy(logits, labels, reduction="none") * (1 + noise)).mean()


def test_a_loss_is_called_once_more_and_never_again():
    torch.manual_seed(0)
    model, loss = ready(), Counting()
    for step in range(1, 4):
        entprop.training_step(model, IMAGES, LABELS, method=Vanilla(), loss=loss)
        assert (loss.calls, loss.seen.item()) == (step + 1, 12 * step)
    drawn = torch.rand(4)
    torch.manual_seed(0)
    model, loss = ready(), mean_by_construction(Counting().forward)
    for _ in range(3):
        entprop.training_step(model, IMAGES, LABELS, method=Vanilla(), loss=loss)
    assert torch.equal(drawn, torch.rand(4))


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 2.0, 4.0])),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda logits, labels: F.cross_entropy(logits, labels) + logits.square().mean(),
        lambda logits, labels: 0 * logits.sum(),
        lambda logits, labels: (F.cross_entropy(logits, labels, reduction="none") * torch.linspace(0, 1, 12)).mean(),
    ],
    ids=["weighted", "smoothed", "regularised", "zero", "for_twelve_images"],
)
def test_other_losses_pass(loss):
    entprop.training_step(ready(), IMAGES, LABELS, method=Vanilla(), loss=loss)


def test_the_loss_of_the_hugging_face_trainer_is_not_called_for_this():
    module = pytest.importorskip("entprop_wrap.integrations.hf_trainer.loss")
    assert module.TrainerLoss.mean.entprop_mean
