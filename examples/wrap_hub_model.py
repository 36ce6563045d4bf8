"""Wrap a model of the Hub in two lines, take a training step, and get the model back.

    python examples/wrap_hub_model.py microsoft/resnet-50      # or a local folder
    python examples/wrap_hub_model.py --tiny                   # a small one, without a download

Offline, the small one stands in for a model that is not in the cache.
"""

import argparse

import torch
from transformers import AutoModelForImageClassification, ResNetConfig

import entprop_wrap as entprop

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="microsoft/resnet-50", help="Hub id or local folder")
parser.add_argument("--tiny", action="store_true", help="a small ResNet with random weights")
options = parser.parse_args()

try:
    if options.tiny:
        raise OSError("--tiny")
    model = AutoModelForImageClassification.from_pretrained(options.model)
except OSError as error:
    print(f"note: a small ResNet with random weights instead of {options.model!r} ({str(error).splitlines()[0]})")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    model = AutoModelForImageClassification.from_config(config)
keys = list(model.state_dict())

model = entprop.wrap(model)  # one of the two lines; the other is the import
print(entprop.summary(model))

size = getattr(model.config, "image_size", None) or 224
images = torch.rand(8, 3, size, size)  # in [0, 1]: for images that are normalised, training_step takes pixel_space=
labels = torch.randint(model.config.num_labels, (8,))

model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
out = entprop.training_step(model, images, labels, method=entprop.EntProp(fraction=0.5))
optimizer.step()
print("one step:", ", ".join(f"{name} {value:.3f}" for name, value in out.metrics().items()))

model = entprop.unwrap(model)
print("after unwrap the keys are those of before:", list(model.state_dict()) == keys)
