"""What models, corruptions and attacks do to their images in place, in half precision or in another order."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from entprop_wrap import PixelSpace
from entprop_wrap.errors import ConfigurationError, ImageError, LabelError, ModelOutputError
from entprop_wrap.robustness import PGD, compare, corrupt, corruption, evaluate_robustness
from tests.helpers.small_classifier import SPACE, classifier, dataset, loader, pixels

RAW = pixels(8)
LABELS = torch.arange(8) % 5


def evaluate(model=None, data=None, **options):
    options = {"pixel_space": SPACE, "progress": False, "severities": (3,), "corruptions": ["fog"], **options}
    return evaluate_robustness(model or classifier(), data or loader(), **options)


@corruption((0.1, 0.2, 0.3, 0.4, 0.5))
def darker(pixels, draws, factor):
    return pixels.mul_(factor)


class InPlace(nn.Module):
    """Normalises its images itself, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.net, self.in_place = classifier(), in_place

    def forward(self, images):
        return self.net(images.sub_(0.5).mul_(4) if self.in_place else (images - 0.5) * 4)


def test_a_corruption_may_work_in_place():
    first, last = evaluate(corruptions=[darker, "fog"]), evaluate(corruptions=["fog", darker])
    assert first.per_corruption == last.per_corruption
    images = RAW.clone()
    darker(images, 1)
    assert torch.equal(images, RAW)


def test_a_model_may_normalise_in_place():
    data = [(RAW.clone(), LABELS)]
    options = {"pixel_space": None, "data": data, "attacks": {"PGD": PGD(8 / 255, steps=2)}}
    found = evaluate({"one": InPlace(True).eval(), "two": InPlace(False).eval()}, **options)
    assert found["one"] == found["two"]
    assert torch.equal(data[0][0], RAW)


def test_an_attack_may_change_its_images():
    def brighter(model, images, labels, pixel_space, generator):
        return images.add_(0.2).clamp_(0, 1)

    data = [(RAW.clone(), LABELS)]
    with_attack = evaluate(data=data, pixel_space=None, attacks={"brighter": brighter})
    assert with_attack.table == evaluate(data=data, pixel_space=None).table
    assert torch.equal(data[0][0], RAW)


@pytest.mark.parametrize("name", ["caustic_refraction", "pixelate", "elastic_transform", "defocus_blur"])
def test_autocast_does_not_reach_the_corruptions(name):
    exact = corrupt(RAW, name, 3, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(corrupt(RAW, name, 3, torch.Generator().manual_seed(0)), exact)


def test_a_corruption_that_returns_no_images_is_refused():
    listed = corruption((1,) * 5)(lambda pixels, draws, constant: [pixels])
    with pytest.raises(ImageError, match=r"must return pixels of shape \(8, 3, 32, 32\), found list"):
        listed(RAW, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attacks_on_images_in_half_precision_stay_in_the_ball(dtype):
    images = RAW.to(dtype)
    attacked = PGD(1 / 255, steps=3)(classifier(), images, LABELS)
    assert attacked.dtype == torch.float32
    assert (attacked - images.float()).abs().max() <= 1 / 255 + 1e-6


def test_a_shuffled_loader_is_warned_of():
    with pytest.warns(UserWarning, match=r"The data: the DataLoader shuffles.*shuffle=False"):
        evaluate(data=DataLoader(dataset(), 4, shuffle=True))


def test_another_pixel_space_is_warned_of_once():
    inside = 0.9 * RAW + 0.05
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate(data=[(inside, LABELS), (inside, LABELS)])
    assert len([one for one in caught if "looks like pixels in [0, 1]" in str(one.message)]) == 1
    with pytest.warns(UserWarning, match=r"next to nothing of.*do_rescale=False"):
        evaluate(pixel_space=PixelSpace(0.5 / 255, 0.5 / 255), data=[(2 * RAW - 1, LABELS)])


def test_the_order_of_corruptions_does_not_matter_to_comparisons_and_the_seed_does():
    one, other = evaluate(corruptions=["fog", "snow"]), evaluate(corruptions=["snow", "fog"])
    assert compare({"one": one, "other": other}).differences["other"]["RA"].mean == 0
    assert one.mce(other) == 1
    with pytest.raises(ConfigurationError, match=r"same protocol.*seed 1"):
        one.mce(evaluate(corruptions=["fog", "snow"], seed=1))


def test_one_logit_and_floating_labels_say_what_to_write():
    binary = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1)).eval()
    with pytest.raises(ModelOutputError, match=r"return torch\.cat\(\[-z, z\], 1\) / 2"):
        evaluate(binary, data=[(RAW, LABELS % 2)], pixel_space=None)
    for labels in (LABELS.float(), LABELS.float()[:, None]):
        with pytest.raises(LabelError, match=r"Write labels\.long\(\)\.flatten\(\)"):
            evaluate(data=[(RAW, labels)], pixel_space=None)
