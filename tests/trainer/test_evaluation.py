"""Evaluation calls a loss as a step does."""

import pytest
import torch

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError
from tests.helpers.trainer_toys import GroupNormNet, Images, make


def trainer(folder, loss):
    config = entprop.TrainerConfig(epochs=1, batch_size=16, output_dir=folder, progress=False)
    return entprop.Trainer(make(GroupNormNet), Images(), Images(20), loss=loss, config=config)


def test_a_loss_is_given_what_it_asks_for(tmp_path):
    seen = []

    def loss(logits, labels, outputs, images, rows):
        if not torch.is_grad_enabled():
            seen.append((outputs is logits, tuple(images.shape), rows.tolist()))
        return torch.nn.functional.cross_entropy(logits, labels)

    found = trainer(tmp_path / "asking", loss).fit()
    assert found == trainer(tmp_path / "plain", None).fit()
    assert seen[-2:] == [(True, (16, 3, 8, 8), [*range(16)]), (True, (4, 3, 8, 8), [*range(4)])]


def test_a_sum_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="mean over the images"):
        trainer(tmp_path, torch.nn.CrossEntropyLoss(reduction="sum")).evaluate()
