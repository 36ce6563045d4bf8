"""The gradient of the images through the first layer, and where that is not the whole of it."""

import copy

import pytest
import torch
import transformers
from torch import nn

import entprop_wrap as entprop
from entprop_wrap import EntProp
from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.methods import input_gradient

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")
EPSILON = 0.01


class Net(nn.Module):
    """Logits from a convolution and, unless ``beside`` is None, from the pixels themselves with this weight."""

    def __init__(self, beside):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.pixels, self.beside = nn.Linear(3 * 36, 5), beside

    def forward(self, images):
        logits = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        if self.beside is None:
            return logits
        return logits + self.beside * self.pixels(images.flatten(1))


@pytest.mark.parametrize("frozen", [(), (0, 1, 2, 3), (1, 2), (0, 3)], ids=["no", "all", "later", "at first"])
@pytest.mark.parametrize("beside", [None, 0.0, 0.3, 30.0])
def test_it_is_that_of_the_selected_rows_in_every_step(beside, frozen):
    torch.manual_seed(0)
    model = entprop.wrap(Net(beside).double())
    method = EntProp(fraction=0.5, epsilon=EPSILON, mix=None)
    for step in range(4):  # the first finds out how, the others rely on it
        model.conv.requires_grad_(step not in frozen)
        images, labels = torch.rand(8, 3, 6, 6, dtype=torch.float64) * 0.8 + 0.1, torch.arange(8) % 5
        leaf = images.clone().requires_grad_()
        with torch.random.fork_rng(devices=[]):
            loss = nn.functional.cross_entropy(model(leaf), labels)
        (gradient,) = torch.autograd.grad(loss, leaf)
        out = entprop.training_step(model, images, labels, method=method)
        expected = images[out.selected] + EPSILON * gradient[out.selected].sign()
        torch.testing.assert_close(out.aux_images, expected, rtol=0, atol=1e-12)
        model.zero_grad()


def test_a_path_that_is_silent_in_the_first_step_is_heard_later():
    """Its gradient was zero when the two were compared."""
    torch.manual_seed(0)
    model = entprop.wrap(Net(0.0).double())
    images, labels = torch.rand(8, 3, 6, 6, dtype=torch.float64) * 0.8 + 0.1, torch.arange(8) % 5
    method = EntProp(fraction=1.0, epsilon=EPSILON, mix=None)
    entprop.training_step(model, images, labels, method=method)
    model.beside = 30.0
    model.zero_grad()
    trained, fresh = (
        entprop.training_step(one, images, labels, method=method) for one in (model, copy.deepcopy(model))
    )
    assert torch.equal(trained.aux_images, fresh.aux_images)


class Padding(Net):
    """Images of another size than 6 do not go straight into the convolution."""

    def forward(self, images):
        return super().forward(images if images.shape[-1] == 6 else nn.functional.interpolate(images, size=6))


def test_images_of_another_size_may_go_elsewhere():
    model = entprop.wrap(Padding(None))
    for size in (6, 8, 6, 8):
        images, labels = torch.rand(8, 3, size, size), torch.arange(8) % 5
        entprop.training_step(model, images, labels, method=EntProp(fraction=0.5, mix=None))
        known = input_gradient._stems[model]
    assert sorted((kind[0][-1], stem is None) for kind, stem in known.items()) == [(6, False), (8, True)]


class Noisy(nn.Conv2d):
    """Run again, it is another function."""

    def forward(self, images):
        return self._conv_forward(images, self.weight * torch.rand_like(self.weight), self.bias)


def test_a_layer_that_is_another_one_when_run_again_is_left_to_autograd():
    model = Net(None)
    model.conv = Noisy(3, 4, 3)
    entprop.wrap(model)
    entprop.training_step(model, torch.rand(8, 3, 6, 6), torch.arange(8) % 5, method=EntProp(mix=None))
    assert list(input_gradient._stems[model].values()) == [None]


@pytest.mark.parametrize("name", ["ResNet", "ViT"])
def test_models_of_the_hub_take_the_short_way(name):
    sizes = {"image_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    few = {"depths": [1, 1], "hidden_sizes": [8, 8], "patch_size": 4}
    config = getattr(transformers, f"{name}Config")(**sizes, **few, embedding_size=8, num_labels=5)
    model = entprop.wrap(getattr(transformers, f"{name}ForImageClassification")(config).train())
    entprop.training_step(model, torch.rand(8, 3, 32, 32), torch.arange(8) % 5, method=EntProp(mix=None))
    (stem,) = input_gradient._stems[model].values()
    assert stem is not None


def test_images_that_go_elsewhere_after_the_first_step_are_noticed():
    model = entprop.wrap(Net(None))
    images, labels = torch.rand(8, 3, 6, 6), torch.arange(8) % 5
    entprop.training_step(model, images, labels, method=EntProp(mix=None))
    first, model.conv = model.conv, nn.Conv2d(3, 4, 3)  # noqa: F841 - kept alive
    with pytest.raises(UnsupportedModelError, match="no longer go straight"):
        entprop.training_step(model, images, labels, method=EntProp(mix=None))
    model.zero_grad()
    entprop.training_step(model, images, labels, method=EntProp(mix=None))  # finds out anew


class Casting(Net):
    """As Accelerate runs a model in bf16: autocast inside the forward alone."""

    def forward(self, images):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(images)


@pytest.mark.parametrize("trains", [True, False])
def test_the_first_step_rounds_as_the_others_do(trains):
    """Or a run that is resumed, which has a first step of its own, would part from one that was not."""
    torch.manual_seed(0)
    model = entprop.wrap(Casting(None))
    model.conv.requires_grad_(trains)
    images, labels = torch.rand(16, 3, 6, 6), torch.arange(16) % 5
    method = EntProp(fraction=0.5, mix=None)
    first, second = (entprop.training_step(model, images, labels, method=method).aux_images for _ in range(2))
    assert torch.equal(first, second)
