"""What the user has put into evaluation mode stays so while the Trainer trains."""

import warnings

import pytest
import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.methods import Vanilla
from tests.helpers.trainer_toys import BatchNormNet, Images, make
from tests.helpers.trainers import trainer

MESSAGE = "1 modules are in evaluation mode and stay so while training, such as a BatchNorm2d"


def trainer_of(model, folder, method=None, **options):
    return trainer(folder, model, Images(20), Images(8), method=method or entprop.EntProp(fraction=0.8), **options)


def frozen():
    model = make(BatchNormNet).train()
    model.bn.eval()
    return model


def modes(model):
    return {name: module.training for name, module in model.named_modules() if "entprop" not in name}


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5}, {"mixed_precision": "bf16"}], ids=str)
def test_a_frozen_norm_stays_frozen(tmp_path, options):
    model = frozen()
    before = {name: buffer.clone() for name, buffer in model.bn.named_buffers()}
    weight = model.fc.weight.detach().clone()
    with pytest.warns(UserWarning, match=MESSAGE):
        trainer_of(model, tmp_path, **options).fit()
    assert modes(model) == modes(frozen())
    assert all(torch.equal(before[name], buffer) for name, buffer in entprop.unwrap(model).bn.named_buffers())
    assert not torch.equal(weight, model.fc.weight)


def test_frozen_after_the_trainer_was_built_or_evaluated_in_between(tmp_path):
    model = make(BatchNormNet).train()
    late = trainer_of(model, tmp_path / "late")
    model.bn.eval()
    with pytest.warns(UserWarning, match=MESSAGE):
        late.fit()
    early = trainer_of(model, tmp_path / "early")
    model.eval()
    with pytest.warns(UserWarning, match=MESSAGE):
        early.fit()
    assert modes(model) == modes(frozen())
    assert model.bn.num_batches_tracked == 0


def test_a_model_in_evaluation_mode_is_trained_as_a_whole(tmp_path):
    model = make(BatchNormNet).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer_of(model, tmp_path, Vanilla()).fit()
    assert all(modes(model).values())
    assert model.bn.num_batches_tracked == 4


def test_dropout_may_be_off(tmp_path):
    class Deterministic(nn.Dropout):
        def forward(self, images):
            assert not self.training
            return super().forward(images)

    model = make(BatchNormNet).train()
    model.dropout = Deterministic().eval()
    with pytest.warns(UserWarning, match="such as a Deterministic"):
        trainer_of(model, tmp_path, Vanilla()).fit()
