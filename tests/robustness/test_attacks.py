"""Attacks, against naive ones in float64."""

import pytest
import torch

from entprop_wrap import PixelSpace
from entprop_wrap.errors import (
    ConfigurationError,
    ImageError,
    LabelError,
    ModelOutputError,
    PixelRangeError,
    UnsupportedModelError,
)
from entprop_wrap.robustness import FGSM, PGD, accuracy_against_epsilon
from entprop_wrap.robustness.corruptions.random import Draws, Streams
from tests.helpers.small_classifier import CLASSES, SPACE, classifier, dataset, loader, pixels


def double(count=6):
    images, labels = dataset(count).tensors
    return classifier().double(), images.double(), labels


def normalised(x, space=SPACE):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (space.mean, space.std))
    return (x - mean) / std


def raw(x, space=SPACE):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (space.mean, space.std))
    return x * std + mean


def naive_pgd(model, image, label, start, epsilon, size, steps, norm):
    """One image (3, H, W) at a time, in pixels."""
    origin, x = raw(image), start.clone()
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (-model(normalised(x)[None])[0].log_softmax(0)[label]).backward()
        g = x.grad
        with torch.no_grad():
            if norm == "linf":
                x = x + size * g.sign()
                x = torch.minimum(torch.maximum(x, origin - epsilon), origin + epsilon)
            else:
                x = x + size * g / g.pow(2).sum().sqrt()
                distance = (x - origin).pow(2).sum().sqrt()
                if distance > epsilon:
                    x = origin + (x - origin) * epsilon / distance
            x = x.clamp(0, 1)
    return x.detach()


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 8 / 255), ("l2", 0.7)])
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_equals_the_naive_one(norm, epsilon, random_start):
    model, images, labels = double()
    attack = PGD(epsilon, 5, epsilon / 3, norm=norm, random_start=random_start)
    found = attack(model, images, labels, SPACE, torch.Generator().manual_seed(4))
    assert found.dtype == torch.float64
    draws = Draws(images, torch.Generator().manual_seed(4))
    starts = attack._start(raw(images).clamp(0, 1), draws) if random_start else raw(images)
    for i in range(len(images)):
        expected = naive_pgd(model, images[i], labels[i], starts[i], epsilon, epsilon / 3, 5, norm)
        torch.testing.assert_close(raw(found[i]), expected, rtol=0, atol=1e-10)


def test_fgsm_equals_one_signed_step():
    model, images, labels = double()
    found = FGSM(3 / 255)(model, images, labels, SPACE)
    for i in range(len(images)):
        expected = naive_pgd(model, images[i], labels[i], raw(images[i]), 3 / 255, 3 / 255, 1, "linf")
        torch.testing.assert_close(raw(found[i]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 4 / 255), ("l2", 0.5)])
def test_attacks_stay_in_the_ball_and_in_valid_pixels(norm, epsilon):
    model, (images, labels) = classifier(), dataset(8).tensors
    images[:2] = (torch.tensor([0.0, 1.0]).view(2, 1, 1, 1) - torch.tensor(SPACE.mean).view(-1, 1, 1)) / torch.tensor(
        SPACE.std
    ).view(-1, 1, 1)
    before = [parameter.clone() for parameter in model.state_dict().values()]
    found = PGD(epsilon, steps=4, norm=norm)(model, images, labels, SPACE, torch.Generator())
    change = (raw(found.double()) - raw(images.double())).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert (size <= epsilon * (1 + 1e-4)).all()
    assert (size >= epsilon * 0.5).all()
    assert raw(found.double()).min() >= -1e-6
    assert raw(found.double()).max() <= 1 + 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_random_starts_fill_the_ball():
    origin = torch.full((4000, 1, 1, 2), 0.5)
    start = PGD(0.4, norm="l2")._start(origin, Draws(origin, torch.Generator().manual_seed(0))) - origin
    radius = start.flatten(1).norm(dim=1) / 0.4
    assert radius.max() <= 1 + 1e-5
    # In two dimensions the share within half the radius is a quarter, and the mean radius 2/3.
    assert abs(float((radius < 0.5).float().mean()) - 0.25) < 0.03
    assert abs(float(radius.mean()) - 2 / 3) < 0.02
    assert start.mean().abs() < 0.01
    linf = PGD(0.1)._start(origin, Draws(origin, torch.Generator().manual_seed(0))) - origin
    assert abs(float(linf.abs().mean()) - 0.05) < 0.002


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_do_not_depend_on_the_batch_size(norm):
    model, images, labels = double(7)
    attack = PGD(2 / 255, steps=3, norm=norm)
    whole = attack(model, images, labels, SPACE, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    parts = [attack(model, x, y, SPACE, generator) for x, y in zip(images.split(3), labels.split(3), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


def test_confident_models_still_have_a_gradient():
    model, (images, _) = classifier(), dataset(6).tensors
    with torch.no_grad():
        model[-1].weight.mul_(300)
        labels = model(images).argmax(1)
        assert (model(images).softmax(1).amax(1) == 1).any()  # saturated in float32
    for attack in (PGD(64 / 255, steps=20), PGD(12, steps=20, norm="l2")):
        found = attack(model, images, labels, SPACE, torch.Generator())
        assert (model(found).argmax(1) != labels).all()


def test_another_model_is_attacked_in_its_place():
    model, source = classifier(), classifier(seed=5)
    images, labels = dataset(6).tensors
    expected = PGD(4 / 255, steps=3)(source, images, labels, SPACE, torch.Generator().manual_seed(0))
    attack = PGD(4 / 255, steps=3, source=source)
    assert torch.equal(attack(model, images, labels, SPACE, torch.Generator().manual_seed(0)), expected)
    assert attack.at(2 / 255).source is source
    with pytest.raises(ConfigurationError, match="training mode"):
        PGD(source=source.train())(model, images, labels, SPACE)
    with pytest.raises(UnsupportedModelError, match=r"source: expected a torch\.nn\.Module"):
        PGD(source="x")


def test_accuracy_falls_with_epsilon_to_zero():
    epsilons = (0, 1 / 255, 8 / 255, 64 / 255)
    model = classifier()
    images, _ = dataset(12).tensors
    data = [(images, model(images).argmax(1))]
    found = accuracy_against_epsilon(model, data, epsilons, attack=PGD(steps=10), pixel_space=SPACE, progress=False)
    assert tuple(found) == epsilons
    values = list(found.values())
    assert values[0] == 1
    assert values[-1] == 0
    assert values == sorted(values, reverse=True)
    attacked = PGD(8 / 255, steps=10)(model, images, data[0][1], SPACE, Streams(0).at(0, "epsilon"))
    assert found[8 / 255] == float((model(attacked).argmax(1) == data[0][1]).float().mean())
    with pytest.raises(PixelRangeError, match="8/255"):
        accuracy_against_epsilon(model, data, (8,), pixel_space=SPACE, progress=False)
    with pytest.raises(ConfigurationError, match="epsilons"):
        accuracy_against_epsilon(model, data, (), pixel_space=SPACE, progress=False)


def test_models_that_cannot_be_attacked_are_refused():
    images, labels = dataset(4).tensors
    with pytest.raises(ConfigurationError, match="training mode"):
        PGD()(classifier().train(), images, labels, SPACE)
    with pytest.raises(UnsupportedModelError, match="float16"):
        PGD()(classifier().half(), images, labels, SPACE)
    hidden = classifier()
    hidden.forward = torch.no_grad()(hidden.forward)
    with pytest.raises(UnsupportedModelError, match="PGD\\(source="):
        PGD()(hidden, images, labels, SPACE)
    with pytest.raises(LabelError, match=f"{CLASSES} logits"):
        PGD()(classifier(), images, labels + CLASSES, SPACE)


@pytest.mark.parametrize(
    ("change", "space", "error", "message"),
    [
        (lambda x: x * 255, None, PixelRangeError, "0-255"),
        (lambda x: x.index_fill(0, torch.tensor([1]), torch.nan), None, ImageError, "not finite"),
        (lambda x: x, ((0.5,), (0.5,)), ConfigurationError, "pixel_space must be a PixelSpace"),
    ],
)
def test_images_that_are_refused(change, space, error, message):
    with pytest.raises(error, match=message):
        FGSM()(classifier(), change(pixels(4)), torch.zeros(4, dtype=torch.long), space)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    model = classifier()
    with torch.no_grad():
        model[-1].bias[1] = value
    for attack, attacked in ((FGSM(), model), (PGD(source=model), classifier())):
        with pytest.raises(ModelOutputError, match="4 of 4 images are NaN or infinite"):
            attack(attacked, pixels(4), torch.zeros(4, dtype=torch.long))


def test_labels_that_are_refused():
    for labels, message in (
        (torch.zeros(3).long(), "4 class indices"),
        (torch.zeros(4), r"labels\.long"),
        ([0] * 4, "list"),
    ):
        with pytest.raises(LabelError, match=message):
            FGSM()(classifier(), pixels(4), labels)


def test_attack_without_a_pixel_space_takes_pixels():
    model, images = classifier(), pixels(4)
    labels = torch.zeros(4, dtype=torch.long)
    one = FGSM(2 / 255)(model, images, labels)
    assert torch.equal(one, FGSM(2 / 255)(model, images, labels, PixelSpace()))
    assert next(iter(loader(4)))[0].shape == one.shape
