"""First encounters of users: platforms without float64, dropout, optimizers, teachers, more heads."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import HfArgumentParser, Trainer
from transformers.modeling_outputs import ImageClassifierOutput

from entprop_wrap import EntProp
from entprop_wrap.errors import ConfigurationError, EntPropError, UnsupportedModelError
from entprop_wrap.integrations.hf_trainer import EntPropCallback
from entprop_wrap.methods import Vanilla
from tests.integrations.hf_trainer_reference import (
    CLASSES,
    averaged,
    build,
    callback,
    make_trainer,
    train,
    with_compute_loss,
    worst,
)


class NoFloat64(TorchDispatchMode):
    """As on Apple's MPS."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before, after = (
            {leaf.dtype for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)} for tree in (args, result)
        )
        if torch.float64 in after and torch.float32 in before:  # not what is computed from numbers, on the CPU
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as MPS doesn't support float64.")
        return result


@pytest.mark.parametrize("added", [None, callback()], ids=["alone", "callback"])
def test_nothing_on_the_device_is_float64(added, tmp_path):
    with NoFloat64():
        train(build("ViT"), added, tmp_path, max_steps=2)


def distilling(trainer, model, inputs):
    """Learns from a teacher on the same images."""
    assert inputs["pixel_values"].shape[1:] == (3, 16, 16)
    with torch.no_grad():
        teacher = build("ResNet")(pixel_values=inputs["pixel_values"]).logits
    outputs = model(**inputs)
    return outputs.loss + F.kl_div(outputs.logits.log_softmax(-1), teacher.softmax(-1)), outputs


def counting(trainer, model, inputs):
    """Reads no more of the images than their number."""
    labels, images = inputs.pop("labels"), inputs["pixel_values"]
    assert len(images) == images.shape[0] == len(labels)
    outputs = model(pixel_values=images.to(labels.device))
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / images.size(0), outputs


def test_a_loss_that_reads_the_images_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"reads the images itself \(conv2d\), as a teacher's loss does"):
        train(build("ViT"), callback(), tmp_path, trainer_class=with_compute_loss(distilling), max_steps=1)


def test_a_loss_may_count_the_images(tmp_path):
    steps = [
        train(build("ViT"), callback(), tmp_path, trainer_class=trainer_class, max_steps=2)[2]
        for trainer_class in (with_compute_loss(counting), Trainer)
    ]
    assert worst(*steps) < 1e-5


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "adalomo"])
def test_optimizers_that_step_inside_the_backward_are_refused_before_training(optim, tmp_path):
    with pytest.raises(UnsupportedModelError, match=f"{optim}.*inside the backward.*adamw_torch"):
        make_trainer(tmp_path, optim=optim, callbacks=[callback()])


def test_dropout_that_leaves_nothing_is_named(tmp_path):
    config = transformers.MobileNetV1Config(num_labels=CLASSES, depth_multiplier=0.25)
    model = transformers.MobileNetV1ForImageClassification(config)
    with pytest.warns(UserWarning, match=r"'dropout' drops 99.9% of its input.*finetuning\.repair_keep_"):
        make_trainer(tmp_path, model=model, callbacks=[callback()])
    model.get_submodule("dropout").p = 0.2


class TwoHeads(nn.Module):
    """As GoogLeNet with its auxiliary classifiers."""

    def __init__(self, own_loss=False):
        super().__init__()
        self.own_loss = own_loss
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head, self.auxiliary = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)
        self.config = transformers.PretrainedConfig()

    def forward(self, pixel_values, labels=None):
        features = F.relu(self.norm(self.stem(pixel_values))).mean((2, 3))
        logits, auxiliary, loss = self.head(features), self.auxiliary(features), None
        if labels is not None and self.own_loss:
            loss = F.cross_entropy(logits, labels) + 0.3 * F.cross_entropy(auxiliary, labels)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        output["auxiliary_logits"] = auxiliary
        return output


@pytest.mark.parametrize("own_loss", [True, False])
def test_a_second_head_does_not_stop_training_unnoticed(own_loss, tmp_path):
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "compute_loss_func": None if own_loss else averaged}
    message = r"'auxiliary_logits'.*Switch the heads off.*a loop of your own"
    with pytest.raises(EntPropError, match=message):
        train(TwoHeads(own_loss), callback(), tmp_path, **options)


def test_a_training_step_given_as_an_attribute_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[callback(Vanilla())])
    trainer.training_step = trainer.training_step
    with pytest.raises(ConfigurationError, match="another training_step as an attribute"):
        trainer.train()


def test_a_callback_that_was_removed_leaves_the_trainer_its_step(tmp_path):
    added = callback(Vanilla())
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[added])
    assert type(trainer).__name__ == "Trainer"
    trainer.train()
    assert "main_loss" in trainer.state.log_history[0]
    trainer.remove_callback(added)
    trainer.train()
    assert "main_loss" not in trainer.state.log_history[0]


def test_the_method_from_a_command_line():
    (method,) = HfArgumentParser((EntProp,)).parse_args_into_dataclasses(["--fraction", "0.3", "--attack_steps", "5"])
    assert EntPropCallback(method).method == EntProp(fraction=0.3, attack_steps=5)
