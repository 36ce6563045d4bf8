"""ME-ADA's growth of the data: what it makes, against the reference, in which form, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

import entprop_wrap as entprop
from entprop_wrap.data.grown_images import GrownImages, to_bytes
from entprop_wrap.errors import ConfigurationError, DataError, UnsupportedModelError
from entprop_wrap.methods import EntropyAscent, grow
from tests.helpers.trainer_toys import BatchNormNet, Images, make
from tests.reference import meada as reference

SPACE = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
ASCENT = EntropyAscent(steps=2, step_size=1.0)


class Samples(Images):
    """Images in a pixel space, in float64, with soft or plain labels, as pairs or dicts."""

    def __init__(self, *, soft=False, mapping=False, tensors=False):
        super().__init__(10)
        self.soft, self.mapping, self.tensors = soft, mapping, tensors

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        mean, std = (torch.tensor(SPACE[name], dtype=torch.float64).view(3, 1, 1) for name in ("mean", "std"))
        image = (image.double() - mean) / std
        label = torch.eye(4).double()[label] if self.soft else torch.tensor(label) if self.tensors else label
        return {"label": label, "image": image} if self.mapping else (image, label)


def stacked(data, start=0):
    return default_collate([data[index] for index in range(start, len(data))])


@pytest.mark.parametrize("form", [{}, {"soft": True}, {"mapping": True}, {"tensors": True}], ids=str)
def test_phases_against_the_reference(form):
    """In each of two phases every image of the data as it then is climbs alone."""
    model, plain = make(BatchNormNet).double(), Samples(soft=form.get("soft", False))
    model.bn.running_mean.uniform_(-0.2, 0.2)
    data, space = Samples(**form), entprop.PixelSpace(**SPACE)
    images, labels = stacked(plain)

    def logits_and_features(pixels):
        hidden = torch.relu(model.bn(model.conv(pixels))).mean((2, 3))
        return model.fc(hidden), hidden

    for _ in range(2):
        grown = grow(model, data, ascent=ASCENT, pixel_space=space, batch_size=4, progress=False)
        assert all(module.training for module in model.modules())
        model.eval()
        limits = {"eta": 10.0, "gamma": 1.0, "steps": 2, "step_size": 1.0}
        climbed = reference.climb(logits_and_features, images, labels, **limits, **SPACE)
        model.train()
        mean, std = (climbed.new_tensor(SPACE[name]).view(3, 1, 1) for name in ("mean", "std"))
        expected = ((climbed * std + mean) * 255).round().byte()
        found = grown.datasets[1]
        assert torch.equal(found.images, expected)
        assert torch.equal(found.labels, labels)
        assert (expected.double() / 255 - (images * std + mean)).abs().max() > 0.02  # it has gone somewhere
        images = torch.cat([images, (expected.double() / 255 - mean) / std])
        labels = torch.cat([labels, labels])
        data = grown
    batch = stacked(data)  # grown and other samples make one
    first = Samples(**form)[0]
    assert all(type(sample) is type(first) and len(sample) == 2 for sample in (data[10], data[39]))
    found = (batch["image"], batch["label"]) if form.get("mapping") else batch
    torch.testing.assert_close(found[0], images, rtol=0, atol=1e-12)
    assert torch.equal(found[1], labels)


def test_the_result_does_not_depend_on_the_batch_and_nothing_is_left_behind():
    model = entprop.wrap(make(BatchNormNet).double())
    model.bn.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = Samples()
    one, other = (
        grow(model, data, ascent=ASCENT, pixel_space=entprop.PixelSpace(**SPACE), progress=False, **options).datasets[1]
        for options in ({"batch_size": 3}, {"workers": 2})
    )
    assert torch.equal(one.images, other.images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.bn.training
    assert model.training


def test_grown_images_are_augmented_when_loaded_and_not_while_growing():
    model, data = make(BatchNormNet), Images(8)
    plain = grow(model, data, ascent=ASCENT, progress=False)
    darker = grow(model, data, ascent=ASCENT, augment=lambda image: image / 2, progress=False)
    assert torch.equal(darker[9][0], plain[9][0] / 2)
    assert torch.equal(darker[1][0], data[1][0])
    again = [grow(model, grown, ascent=ASCENT, progress=False).datasets[1].images for grown in (plain, darker)]
    assert torch.equal(*again)


def test_a_loss_is_given_what_it_asks_for():
    seen = []

    def loss(logits, labels, outputs, images):
        seen.append((outputs is logits, images.shape))
        return torch.nn.functional.cross_entropy(logits, labels)

    model, data = make(BatchNormNet), Images(8)
    found, expected = (grow(model, data, ascent=ASCENT, loss=one, progress=False) for one in (loss, None))
    assert torch.equal(found.datasets[1].images, expected.datasets[1].images)
    assert (True, (8, 3, 8, 8)) in seen


def test_a_model_of_one_logit_grows_with_a_binary_loss():
    batch = torch.rand(4, 3, 8, 8), torch.ones(4, 1)
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), TensorDataset(*batch)
    assert len(grow(model, data, loss=nn.BCEWithLogitsLoss(), progress=False)) == 8


def test_bytes_and_back():
    space = entprop.PixelSpace(**SPACE)
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    form = {"dtype": torch.float32, "keys": None, "plain_labels": True}
    image, label = GrownImages(every, torch.tensor([3]), space, **form)[0]
    assert image.dtype == torch.float32
    assert label == 3
    assert torch.equal(to_bytes(image[None], space), every)
    bounds = to_bytes(torch.cat(space.bounds(image[None])), space)
    assert torch.equal(bounds, torch.tensor([0, 255]).byte().view(2, 1, 1, 1).expand(2, 3, 1, 1))


def test_a_progress_bar(capsys):
    grow(make(BatchNormNet), Images(8), ascent=ASCENT, batch_size=4)
    assert "growing: 100%" in capsys.readouterr().err


# Refusals -------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class Changed(Images):
    """Samples that are changed by a function."""

    def __init__(self, change):
        super().__init__(8)
        self.change = change

    def __getitem__(self, index):
        return self.change(*super().__getitem__(index))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Stream(), "map-style data"),
        (DataLoader(Images(8), 4), r"grow\(model, loader\.dataset"),
        (Changed(lambda image, label: {"image": image, "label": label, "name": "a"}), "nothing else"),
        (Changed(lambda image, label: (image, label, 3)), "expected batches"),
        (Changed(lambda image, label: (image, [label, label])), "expected batches"),
        (Changed(lambda image, label: (image[:, : 4 + label], label)), "tensor .* of one size"),
        (Changed(lambda image, label: (object(), label)), "nothing else"),
    ],
)
def test_data_that_cannot_grow_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        grow(make(BatchNormNet), data, ascent=ASCENT, progress=False)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ascent": 3}, ConfigurationError),
        ({"ascent": EntropyAscent}, ConfigurationError),
        ({"batch_size": 0}, ConfigurationError),
        ({"augment": "flip"}, ConfigurationError),
        ({"pixel_space": (0.5, 0.5)}, ConfigurationError),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        grow(make(BatchNormNet), Images(8), progress=False, **options)


def test_models_that_cannot_be_climbed_are_refused():
    with pytest.raises(UnsupportedModelError, match="grow"):
        grow("resnet18", Images(8))
    sharded = nn.Linear(2, 2)
    sharded.weight.device_mesh = "as a DTensor has it"
    with pytest.raises(UnsupportedModelError, match="sharded"):
        grow(sharded, Images(8))
