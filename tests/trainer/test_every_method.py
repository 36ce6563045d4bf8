"""Each method in entprop_wrap.Trainer: an epoch is a loop over training_step, bit for bit."""

import math

import pytest
import torch
from accelerate.utils import set_seed

import entprop_wrap as entprop
from entprop_wrap.trainer.data_loader import seed_of
from tests.faults.accidents import lines
from tests.helpers.every_method import METHODS, check_none_is_missing, named
from tests.helpers.trainer_toys import BatchNormNet, Images, make
from tests.helpers.trainers import trainer

RATE = 0.05


def test_no_method_is_missing():
    check_none_is_missing()


@pytest.mark.parametrize("method", METHODS, ids=named)
@pytest.mark.filterwarnings("ignore:Only . images a step")
def test_an_epoch_is_a_loop_over_the_step(tmp_path, method):
    options = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=RATE), "schedule": "constant", "warmup": 0.0}
    options |= {"weight_decay": 0.0, "max_grad_norm": None, "log_every": 1, "epochs": 1, "batch_size": 8}
    run = trainer(tmp_path, BatchNormNet, Images(24), Images(8, seed=1), method=method, **options)
    batches = list(run.train_batches.epoch(0))
    assert math.isfinite(run.fit()["loss"])

    model, begun = make(BatchNormNet).train(), make(BatchNormNet)
    if method.auxiliaries:
        entprop.wrap(model, auxiliaries=method.auxiliaries)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed_of(0, "step", 0))
    set_seed(0, device_specific=True)  # of dropout
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        output = entprop.training_step(model, images, labels, method=method, generator=generator)
        optimizer.step()
        losses.append(float(output.loss))
    found, expected = run.model.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    unmoved = [key for key, value in begun.state_dict().items() if torch.equal(found[key], value)]
    assert unmoved == (["conv.bias"] if "conv.bias" in unmoved else [])  # which a batch norm follows

    assert [line["loss"] for line in lines(tmp_path, "train")] == pytest.approx(losses, rel=1e-6)
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
