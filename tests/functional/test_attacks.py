"""The attacks that methods train with: the L2 ball, magnitudes, and the attack that measures as one that trains."""

import pytest
import torch

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError, PixelRangeError
from entprop_wrap.functional.attacks import PGD, ball_start
from entprop_wrap.methods import AdvProp
from entprop_wrap.robustness import PGD as MeasuringPGD
from entprop_wrap.robustness import accuracy_against_epsilon, evaluate_robustness
from tests.methods.loops import gradients, wrapped
from tests.methods.parity import SPACES, batch_in, seeded
from tests.reference.models import build, random_batch


def raw(images, space):
    mean, std = (torch.tensor(space[name], dtype=torch.float64).view(3, 1, 1) for name in ("mean", "std"))
    return images * std + mean


def slope(pixels):
    """The gradient of a function of pixels, by hand; of one image it vanishes."""
    gradient = torch.cos(3 * pixels) * torch.linspace(-1, 2, pixels[0].numel()).view(pixels[0].shape).double()
    gradient[1] = 0
    return gradient


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("step_size", [0.3, None])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_an_l2_step_equals_the_naive_one_in_pixels(space, step_size, random_start):
    images, _ = batch_in(space)
    std = torch.tensor(space["std"], dtype=torch.float64).view(3, 1, 1)
    attack = PGD(0.7, steps=4, step_size=step_size, norm="l2", random_start=random_start)
    found = attack.run(
        images, lambda moved: slope(raw(moved, space)) * std, entprop.PixelSpace(**space), seeded()
    )  # by the chain rule: what a step of normalised images changes in pixels
    start = ball_start(images, 0.7, entprop.PixelSpace(**space), seeded()) if random_start else images
    for index, (image, begin) in enumerate(zip(raw(images, space), raw(start, space), strict=True)):
        now = begin
        for _ in range(4):
            g = slope(torch.stack([now, now]))[int(index == 1)]
            if g.norm() > 0:
                now = now + (0.3 if step_size else 2.5 * 0.7 / 4) * g / g.norm()
            if (now - image).norm() > 0.7:
                now = image + (now - image) * 0.7 / (now - image).norm()
            now = now.clamp(0, 1)
        torch.testing.assert_close(raw(found[index], space), now, rtol=0, atol=1e-12)


def test_starts_fill_the_l2_ball():
    images = torch.full((4000, 1, 1, 2), 0.5)
    for generator in (seeded(), None):
        radius = (ball_start(images, 0.4, entprop.PixelSpace(), generator) - images).flatten(1).norm(dim=1) / 0.4
        assert radius.max() <= 1 + 1e-5
        # In two dimensions the share within half the radius is a quarter, and the mean radius 2/3.
        assert abs(float((radius < 0.5).float().mean()) - 0.25) < 0.03
        assert abs(float(radius.mean()) - 2 / 3) < 0.02


def test_gradients_that_are_not_finite_move_nothing():
    images, _ = random_batch(3)
    broken = torch.ones_like(images)
    broken[0], broken[1] = torch.nan, torch.inf
    for norm in ("linf", "l2"):
        attack = PGD(0.01, 1, 0.01, False, norm)
        moved = attack.run(images, lambda _: broken.clone(), entprop.PixelSpace(), None)
        assert moved.isfinite().all()
        assert torch.equal(moved[0], images[0])
        assert not torch.equal(moved[2], images[2])


def test_magnitudes_scale_together():
    assert PGD(4 / 255, step_size=1 / 255).at(8 / 255) == PGD(8 / 255, step_size=2 / 255)
    assert PGD(0.5, step_size=None, norm="l2").at(2.0) == PGD(2.0, step_size=None, norm="l2")
    assert type(MeasuringPGD().at(0.1)) is MeasuringPGD


@pytest.mark.parametrize("kind", [PGD, MeasuringPGD])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 4}, "4/255"),
        ({"step_size": 2}, "2/255"),
        ({"steps": 0}, "steps"),
        ({"steps": 1 / 255}, "steps must be an int"),  # the order of arguments: epsilon, steps, step_size
        ({"steps": True}, "steps"),
        ({"norm": "l1"}, "norm"),
        ({"norm": "l2", "epsilon": 0.0}, "epsilon"),
        ({"norm": "l2", "step_size": float("inf")}, "step_size"),
        ({"norm": "l2", "epsilon": 128 / 255, "steps": 5, "step_size": 1 / 255}, "0.502. Write step_size=None"),
    ],
)
def test_options_out_of_range_are_refused(kind, options, message):
    with pytest.raises((ConfigurationError, PixelRangeError), match=message):
        kind(**options)


def test_the_attack_that_measures_trains_like_the_other():
    batch, found = random_batch(8), []
    options = {"epsilon": 4 / 255, "steps": 3, "step_size": 2 / 255}
    for kind in (PGD, MeasuringPGD):
        model = wrapped()
        entprop.training_step(model, *batch, method=AdvProp(kind(**options)), generator=seeded())
        found.append(gradients(model))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
    with pytest.raises(ConfigurationError, match="leave out source"):
        entprop.training_step(wrapped(), *batch, method=AdvProp(MeasuringPGD(**options, source=wrapped())))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_that_trains_measures_like_the_other(norm):
    model = build("batch_norm").eval()
    images = torch.rand(16, 3, 32, 32, generator=seeded(), dtype=torch.float64)
    with torch.no_grad():
        data = [(images, model(images).argmax(1))]
    options = {"epsilon": 8 / 255, "steps": 2, "step_size": 4 / 255, "norm": norm}
    ours, theirs = PGD(**options), MeasuringPGD(**options)
    largest = {"linf": 0.3, "l2": 30.0}[norm]
    curves = [
        accuracy_against_epsilon(model, data, (0, 0.02, largest), attack=attack, progress=False)
        for attack in (ours, theirs)
    ]
    assert curves[0] == curves[1]
    assert curves[0][0] == 1 > curves[0][largest]
    scores = [
        evaluate_robustness(model, data, corruptions=("fog",), severities=(1,), attacks={"a": attack}, progress=False)
        for attack in (ours, theirs)
    ]
    assert scores[0].adversarial == scores[1].adversarial


@pytest.mark.parametrize("steps", [1, 2])
def test_inference_mode_is_named_and_not_no_grad(steps):
    model, (images, labels) = build("batch_norm").eval(), random_batch(8)
    with torch.inference_mode():
        for context in (torch.enable_grad, torch.no_grad):
            with context(), pytest.raises(ConfigurationError, match=r"torch.inference_mode\(False\)"):
                MeasuringPGD(steps=steps)(model, images, labels)
        with torch.inference_mode(False):
            assert not torch.equal(MeasuringPGD(steps=steps)(model, images, labels), images)


def test_a_fraction_in_quotes_is_told_to_lose_them():
    with pytest.raises(PixelRangeError, match="Write epsilon=4/255, say, without quotes"):
        PGD(epsilon="4/255")
