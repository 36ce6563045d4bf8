"""Rows of docs/clients/lightning.md: strategies that are refused, and a loop of one's own inside Lightning."""

import pytest

pytest.importorskip("lightning", reason="lightning is not installed")

import torch
from lightning.pytorch.strategies import DDPStrategy

import entprop_wrap as entprop
from entprop_wrap import EntProp
from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.integrations.lightning import EntPropLightningCallback
from tests.integrations.lightning_reference import SPACE, Classifier, loader, net, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")
METHOD = EntProp(fraction=0.5, mix=None)


class AnotherStrategy(DDPStrategy):
    """As DeepSpeed's and FSDP's are: derived from another, and not to be taken for it."""


class WithIterator(Classifier):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


@pytest.mark.parametrize(
    ("module", "strategy", "message"),
    [
        (Classifier, lambda: AnotherStrategy(), "does not work with AnotherStrategy"),
        (Classifier, lambda: DDPStrategy(static_graph=True), "DDPStrategy with a static graph"),
        (WithIterator, lambda: "auto", r"does not work with dataloader_iter\. Write training_step\(batch, batch_idx\)"),
    ],
    ids=["another", "static graph", "dataloader_iter"],
)
def test_what_is_refused_when_fit_begins(module, strategy, message):
    callback = EntPropLightningCallback(METHOD, pixel_space=SPACE)
    with pytest.raises(UnsupportedModelError, match=message):
        trainer(callback, strategy=strategy()).fit(module(), loader())


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
