"""Models with a second head in Hugging Face's Trainer, whose loss sees the logits only."""

import pytest

pytest.importorskip("transformers")

import transformers
from torch import nn

from entprop_wrap import EntProp
from entprop_wrap.errors import ModelOutputError
from entprop_wrap.integrations.hf_trainer import EntPropCallback
from tests.integrations.hf_trainer_reference import SPACE, arguments, build, samples


class TwoHeadsForImageClassification(transformers.ViTForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        self.second = nn.Linear(config.num_labels, config.num_labels)

    def forward(self, pixel_values, labels=None):
        output = super().forward(pixel_values, labels=labels)
        output["second_logits"] = self.second(output.logits)
        return output


def test_the_error_says_what_the_trainer_can_do(tmp_path):
    callback = EntPropCallback(EntProp(fraction=0.5), pixel_space=SPACE)
    model, options = TwoHeadsForImageClassification(build("ViT").config), arguments(tmp_path, max_steps=1)
    trainer = transformers.Trainer(model, options, train_dataset=samples(), callbacks=[callback])
    with pytest.raises(ModelOutputError, match=r"'second_logits'.*switch the heads off.*a loop of your own"):
        trainer.train()
