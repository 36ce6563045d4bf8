"""Evaluation calls a loss as a step does, and takes the labels and logits that it does."""

import pytest
import torch
from torch import nn

from entprop_wrap.data.validation import Checker
from entprop_wrap.errors import ConfigurationError, LabelError
from tests.faults.accidents import lines
from tests.helpers.trainer_toys import GroupNormNet, Images, make
from tests.helpers.trainers import trainer


def test_a_loss_is_given_what_it_asks_for(tmp_path):
    seen = []

    def loss(logits, labels, outputs, images, rows):
        if not torch.is_grad_enabled():
            seen.append((outputs is logits, tuple(images.shape), rows.tolist()))
        return torch.nn.functional.cross_entropy(logits, labels)

    found, plain = (
        trainer(tmp_path / name, GroupNormNet, eval_data=Images(20), loss=given, epochs=1, batch_size=16).fit()
        for name, given in (("asking", loss), ("plain", None))
    )
    assert found == plain
    assert seen[-2:] == [(True, (16, 3, 8, 8), [*range(16)]), (True, (4, 3, 8, 8), [*range(4)])]


@pytest.mark.parametrize("what", ["images", "labels"])
def test_what_a_device_has_found_is_raised_at_the_end(tmp_path, monkeypatch, what):
    def noted(checker, *args, **options):  # as on an accelerator
        checker._note("found", torch.tensor(True), LabelError)

    monkeypatch.setattr(Checker, what, noted)
    with pytest.raises(LabelError, match="wrong: found"):
        trainer(tmp_path).evaluate()


def test_a_sum_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="mean over the images"):
        trainer(tmp_path, loss=torch.nn.CrossEntropyLoss(reduction="sum")).evaluate()


class OneLogit(nn.Module):
    def __init__(self, outputs=1):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(3), nn.Linear(3, outputs)

    def forward(self, pixels):
        return self.fc(self.norm(pixels.mean((2, 3))))


@pytest.mark.parametrize("form", ["one logit", "one logit, integers", "multi-hot"])
def test_binary_losses_train_and_evaluate(tmp_path, form):
    data = Images(24)
    first = (data.labels % 2).float()
    if form == "multi-hot":
        targets = torch.stack([first, 1 - first, torch.ones(24)], 1)
    else:
        targets = first[:, None] if form == "one logit" else data.labels % 2
    bce = nn.BCEWithLogitsLoss()
    loss = bce if targets.is_floating_point() else lambda logits, labels: bce(logits[:, 0], labels.float())
    samples = [(image, target) for image, target in zip(data.images, targets, strict=True)]
    model = make(OneLogit, outputs=3 if form == "multi-hot" else 1)
    found = trainer(tmp_path, model, samples, samples, loss=loss, epochs=1, batch_size=12, log_every=1).fit()
    with torch.no_grad():
        logits = model.eval()(data.images)
    assert found["loss"] == pytest.approx(float(loss(logits, targets)), rel=1e-5)
    if form == "multi-hot":  # the highest logit is one of the labels
        right = targets[torch.arange(24), logits.argmax(1)] == 1
    else:
        right = (logits[:, 0] > 0) == (first > 0)
    assert found["accuracy"] == pytest.approx(float(right.float().mean()))
    assert all(line["aux_entropy"] > 0 for line in lines(tmp_path, "train"))
