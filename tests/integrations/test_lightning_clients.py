"""The table in docs/clients/lightning.md, row by row: what works with the callback, what is refused, what to write."""

import copy
import sys

import pytest

pytest.importorskip("lightning", reason="lightning is not installed")

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

import entprop_wrap as entprop
from entprop_wrap import EntProp
from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.integrations.lightning import EntPropLightningCallback
from entprop_wrap.robustness import PGD
from entprop_wrap.wrapping.model import is_wrapped
from tests.integrations.lightning_reference import SPACE, Classifier, by_hand, images, loader, net, trainer, worst

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")
METHOD = EntProp(fraction=0.5, mix=None)


def callback(**options):
    return EntPropLightningCallback(METHOD, pixel_space=SPACE, **options)


def test_weight_averaging_callbacks_are_refused():
    since_2_6 = ("WeightAveraging", "EMAWeightAveraging")
    others = [getattr(L.pytorch.callbacks, name)() for name in since_2_6 if hasattr(L.pytorch.callbacks, name)]
    for other in (StochasticWeightAveraging(0.01), *others):
        with pytest.raises(UnsupportedModelError, match=r"Averaging. Write .*entprop.Trainer averages weights"):
            trainer(callback(), other).fit(Classifier(), loader())


def test_an_average_that_the_module_makes_of_its_wrapped_model():
    class Averaging(Classifier):
        def __init__(self):
            super().__init__(entprop.wrap(net()))
            self.__dict__["average"] = AveragedModel(self.model, use_buffers=True)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.average.update_parameters(self.model)

    module = Averaging()
    trainer(callback()).fit(module, loader())
    copies = entprop.auxiliary_state_dict(module.average.module)
    assert copies.keys() == entprop.auxiliary_state_dict(module.model).keys() != set()
    plain = entprop.unwrap(module.average.module).eval()
    net().load_state_dict(plain.state_dict())


def test_synchronised_batch_norms_are_converted_where_the_model_is_made():
    converted = entprop.wrap(nn.SyncBatchNorm.convert_sync_batchnorm(net()))  # CPUs cannot train it
    assert entprop.auxiliary_state_dict(converted).keys() == entprop.auxiliary_state_dict(entprop.wrap(net())).keys()


def test_the_model_is_compiled_inside_the_module():
    module = Classifier(torch.compile(entprop.wrap(net()), backend="eager"))
    batches = list(loader(8))
    trainer(callback(), max_steps=2).fit(module, loader(8))
    expected, _ = by_hand(net(), batches, prefix="model._orig_mod.")
    assert worst(module.gradients, expected) < 1e-5
    assert is_wrapped(module)


class Attacked(Classifier):
    def validation_step(self, batch, batch_idx):
        images, labels = batch
        with torch.enable_grad():
            images = PGD(2 / 255, steps=2)(self.model, images, labels, SPACE)
        self.log("robust", (self.model(images).argmax(-1) == labels).float().mean())


def test_attacks_of_the_package_run_in_the_validation_of_fit():
    for inference_mode in (True, False):
        fitted = trainer(callback(), inference_mode=inference_mode)
        fitted.fit(Attacked(), loader(), loader(8))
        assert 0 <= fitted.callback_metrics["robust"] <= 1


class Prefixed(Classifier):
    """Its classifier has a name that begins as our copies' do."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.entprop_backbone = net()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.entprop_backbone(batch[0]), batch[1])


def test_parts_of_any_name_are_in_the_checkpoint(tmp_path):
    module = Prefixed()
    fitted = trainer(callback(model="entprop_backbone"), folder=tmp_path)
    fitted.fit(module, loader(8))
    written = torch.load(fitted.checkpoint_callback.best_model_path, weights_only=True)
    assert set(written["state_dict"]) == set(Prefixed().state_dict())
    assert len(written["entprop_auxiliary"]) == 7


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.second = net(), nn.Linear(8, 5)

    def forward(self, x):
        features = F.relu(self.main.bn(self.main.conv(x))).mean((2, 3))
        return self.main.fc(self.main.ln(features)), self.second(features)


def test_a_second_head_does_not_stop_training_unnoticed():
    class Both(Classifier):
        def training_step(self, batch, batch_idx):
            outputs = self.model(batch[0])
            return F.cross_entropy(outputs[0], batch[1]) + 0.3 * sum(F.cross_entropy(o, batch[1]) for o in outputs[1:])

    with pytest.raises(entprop.errors.EntPropError, match="heads that a loss of the logits does not train"):
        trainer(callback()).fit(Both(TwoHeads()), loader())

    def loss(logits, labels, outputs):
        return F.cross_entropy(logits, labels) + 0.3 * F.cross_entropy(outputs[1], labels)

    module = Both(TwoHeads())
    model = entprop.wrap(copy.deepcopy(module.model))
    trainer(callback(loss=loss)).fit(module, loader(4))
    entprop.training_step(model, *images(4), method=METHOD, pixel_space=SPACE, loss=loss)
    assert worst(module.gradients, [{"model." + n: p.grad for n, p in model.named_parameters()}]) == 0


def test_manual_optimization_calls_the_step_itself():
    class Manual(Classifier):
        def __init__(self):
            super().__init__(entprop.wrap(net()))
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            entprop.training_step(self.model, *batch, method=METHOD, pixel_space=SPACE, backward=self.manual_backward)
            optimizer.step()

    module, by_hand = Manual(), entprop.wrap(net()).train()
    trainer(max_steps=2).fit(module, loader(8))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=module.lr)
    for batch in list(loader(8))[:2]:
        optimizer.zero_grad()
        entprop.training_step(by_hand, *batch, method=METHOD, pixel_space=SPACE)
        optimizer.step()
    assert all(map(torch.equal, module.model.state_dict().values(), by_hand.state_dict().values()))


YAML = """
model:
  class_path: tests.integrations.lightning_reference.Classifier
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: entprop_wrap.integrations.lightning.EntPropLightningCallback
      init_args:
        method:
          class_path: entprop_wrap.EntProp
          init_args: {fraction: 0.5, attack_steps: 2}
        pixel_space:
          class_path: entprop_wrap.PixelSpace
          init_args: {mean: [0.5, 0.4, 0.3], std: [0.5, 0.25, 0.2]}
"""


def test_the_command_line_builds_the_callback(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "run.yaml").write_text(YAML)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "run.yaml")])
    cli = LightningCLI(run=False, save_config_callback=None)
    (added,) = (c for c in cli.trainer.callbacks if isinstance(c, EntPropLightningCallback))
    assert added.method == EntProp(fraction=0.5, attack_steps=2)
    assert added.pixel_space == SPACE
    cli.trainer.fit(cli.model, loader(8))
    assert "aux_loss" in cli.trainer.callback_metrics
