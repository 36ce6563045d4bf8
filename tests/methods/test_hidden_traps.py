"""What once went wrong in silence: statistics of other norms, cached constants, augmentations and scores."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.diagnostics import input_jacobian
from entprop_wrap.errors import ConfigurationError, ImageError, LabelError, ModelOutputError, UnsupportedModelError
from entprop_wrap.functional.attacks import PGD
from entprop_wrap.methods import (
    MEADA,
    AdversarialTraining,
    AdvProp,
    EntProp,
    EntropyAscent,
    FastAdvProp,
    FineGrainedAdvProp,
    MixProp,
    Vanilla,
    grow,
)
from entprop_wrap.robustness import accuracy_against_epsilon
from tests.helpers.traceless import IMAGES, LABELS, ready
from tests.helpers.trainer_toys import BatchNormNet, make


class VarianceNorm(nn.Module):
    """A norm that is none of torch's, as timm's EvoNorm: it records a running variance in training mode."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("recorded", torch.zeros((), dtype=torch.long))

    def forward(self, images):
        variance = self.running_var
        if self.training:
            variance = images.var((0, 2, 3))
            self.running_var.lerp_(variance.detach(), 0.1)
            self.recorded += 1
        return images * (self.weight / (variance + 1e-5).sqrt()).view(1, -1, 1, 1)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize(
    "method",
    [AdversarialTraining(PGD(steps=3)), AdversarialTraining(PGD(steps=3), kind="trades")],
    ids=["pgd", "trades"],
)
def test_an_attack_records_no_statistics_in_any_norm(method, wrapped):
    model = make(BatchNormNet)
    model.bn = VarianceNorm(8)
    model = (entprop.wrap(model) if wrapped else model).train()
    entprop.training_step(model, IMAGES, LABELS, method=method)
    assert model.bn.recorded == (1 if method.kind == "pgd" else 2)
    assert model.bn.training


@pytest.mark.parametrize("method", [EntProp(1.0, attack_steps=4), AdvProp(PGD(steps=3), attack_statistics="batch")])
def test_an_attack_records_no_statistics_in_norms_that_are_left_shared(method):
    model = make(BatchNormNet)
    model.bn = nn.Sequential(model.bn, VarianceNorm(8))
    model = entprop.wrap(model, exclude="bn.1").train()
    entprop.training_step(model, IMAGES, LABELS, method=method)
    assert model.bn[1].recorded == 2


def test_pixel_spaces_first_used_in_inference_mode_serve_training():
    space = entprop.PixelSpace((0.41, 0.4, 0.4), (0.21, 0.2, 0.2))  # of no other test: constants are kept
    with torch.inference_mode():
        space.bounds(IMAGES)
    model = ready().eval()
    data = [((IMAGES - 0.4) / 0.2, LABELS)]
    assert len(accuracy_against_epsilon(model, data, (0, 0.1), pixel_space=space, progress=False)) == 2
    assert not any(constant.is_inference() for constant in (*space.bounds(IMAGES), space.scale(IMAGES)))


@pytest.mark.parametrize("method", [entprop.EntProp(), Vanilla()], ids=["entprop", "vanilla"])
def test_a_model_frozen_as_a_whole_is_refused(method):
    model = ready().requires_grad_(False)
    recorded = model.bn.running_mean.clone()
    with pytest.raises(ConfigurationError, match="No parameter of BatchNormNet has requires_grad=True"):
        entprop.training_step(model, IMAGES, LABELS, method=method)
    assert torch.equal(model.bn.running_mean, recorded)
    next(model.parameters()).requires_grad_(True)
    entprop.training_step(model, IMAGES, LABELS, method=method)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make(BatchNormNet)

    def forward(self, images):
        return self.net(images.sub_(0.5).div_(0.25))


@pytest.mark.parametrize("method", [entprop.EntProp(), entprop.EntProp.augmented(copies="all"), AdvProp(), Vanilla()])
def test_a_model_that_changes_its_images_in_place_is_refused(method):
    model = InPlace()
    wrapped = entprop.wrap(model, auxiliaries=method.auxiliaries) if method.auxiliaries else model
    with pytest.raises(UnsupportedModelError, match=r"changes its images in place.*x = x - mean"):
        entprop.training_step(wrapped.train(), IMAGES.clone(), LABELS, method=method)


class Detached(BatchNormNet):
    """As a frozen backbone under no_grad: nothing says how logits change with the images."""

    def forward(self, images):
        return super().forward(images.detach())


@pytest.mark.parametrize("method", [AdvProp(), AdversarialTraining(), MEADA(EntropyAscent(steps=1)), FastAdvProp(0.7)])
def test_a_model_that_detaches_its_images_is_refused(method):
    with pytest.raises(ModelOutputError, match="No gradient reached the images"):
        entprop.TrainingStep(make(Detached).train(), method)(IMAGES, LABELS)


def test_images_that_something_else_trains_on_are_refused():
    before = nn.Conv2d(3, 3, 1)
    model = ready()
    with pytest.raises(ImageError, match=r"Put it inside the model, or write images\.detach\(\)"):
        entprop.training_step(model, before(IMAGES).sigmoid(), LABELS)
    entprop.training_step(model, IMAGES.clone().requires_grad_(), LABELS)


def test_images_that_were_made_in_inference_mode_serve():
    with torch.inference_mode():
        images, labels = IMAGES.clone(), LABELS.clone()
    torch.manual_seed(0)
    outs = [
        entprop.training_step(ready(), *batch, method=entprop.EntProp(mix=None))
        for batch in ((images, labels), (IMAGES, LABELS))
    ]
    assert outs[0].loss == outs[1].loss


@dataclass(frozen=True)
class OneStep:
    """An attack of one's own, in one call."""

    moved: object
    steps: int = 0

    def run(self, images, gradient, space, generator):
        return self.moved(images)


@pytest.mark.parametrize("kind", ["pgd", "trades"])
def test_an_attack_may_change_its_images_in_place(kind):
    found = []
    for moved in (lambda images: images.mul_(0.5), lambda images: images * 0.5):
        model, images = make(BatchNormNet).train(), IMAGES.clone()
        method = AdversarialTraining(OneStep(moved), kind=kind, clean_weight=0.5 if kind == "pgd" else 0.0)
        found.append(entprop.training_step(model, images, LABELS, method=method).loss)
        assert torch.equal(images, IMAGES)
    assert torch.equal(*found)


@pytest.mark.parametrize("moved", [lambda images: None, lambda images: images[:4], lambda images: images.double()])
def test_an_attack_that_returns_something_else_is_refused(moved):
    with pytest.raises(ConfigurationError, match=r"OneStep.run\(\) must return images like those"):
        entprop.training_step(ready(), IMAGES, LABELS, method=AdvProp(OneStep(moved)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"apply": lambda images: images.mul_(0.5)},
        {"apply": lambda images: images[:4]},
        {"share": torch.full((12,), 0.5)},
        {"share": 1.5},
        {"partner": torch.arange(3)},
    ],
    ids=["in place", "fewer", "shares", "share", "partners"],
)
@pytest.mark.parametrize("make_method", [MixProp, EntProp])
def test_a_mixer_that_draws_something_else_is_refused(make_method, wrong):
    drawn = SimpleNamespace(**{"partner": torch.arange(12), "share": 0.5, "apply": lambda images: images / 2} | wrong)
    method = make_method(mix=SimpleNamespace(draw=lambda shape, generator: drawn))
    with pytest.raises(ConfigurationError, match="must return a mix of 12 images"):
        entprop.training_step(ready(), IMAGES.clone(), LABELS, method=method)


@pytest.mark.parametrize("make_method", [MixProp, EntProp])
def test_a_share_may_be_a_tensor_of_one_number(make_method):
    found = []
    for share in (0.25, torch.tensor(0.25, dtype=torch.float64)):
        drawn = SimpleNamespace(partner=torch.arange(12).roll(1), share=share, apply=lambda images: images / 2)
        method = make_method(mix=SimpleNamespace(draw=lambda shape, generator, drawn=drawn: drawn))
        found.append(entprop.training_step(ready(), IMAGES, LABELS, method=method).loss)
    assert torch.equal(*found)


def test_ignored_labels_say_what_they_are():
    model = ready()
    with pytest.raises(LabelError, match=r"found \[-100, 3\]\. Images without a label \(ignore_index\)"):
        entprop.training_step(model, IMAGES, torch.where(LABELS == 0, -100, LABELS))


def test_augmentations_that_are_not_finite_raise():
    model = ready()
    method = FineGrainedAdvProp({"aux": lambda pixels: pixels / 0 - pixels / 0})
    with pytest.raises(ImageError, match="not finite"):
        entprop.training_step(model, IMAGES, LABELS, method=method)


@pytest.mark.parametrize(
    "uncertainty",
    [
        lambda logits, labels: logits.flatten(),
        lambda logits, labels: logits[:, :1],
        lambda logits, labels: logits.argmax(1) == labels,
        lambda logits, labels: logits[:, 0].numpy(),
        lambda logits, labels: None,
    ],
    ids=["more", "columns", "booleans", "numpy", "nothing"],
)
def test_scores_are_one_number_per_image(uncertainty):
    model = ready()
    with pytest.raises(ConfigurationError, match=r"one score per image, a tensor of shape \(12,\); found "):
        entprop.training_step(model, IMAGES, LABELS, method=entprop.EntProp(fraction=0.7, uncertainty=uncertainty))


@pytest.mark.parametrize("attack", [lambda *rest: rest[1], PGD], ids=["function", "class"])
def test_curves_need_an_attack_of_any_size(attack):
    with pytest.raises(ConfigurationError, match="attack must be "):
        accuracy_against_epsilon(make(BatchNormNet).eval(), [(IMAGES, LABELS)], attack=attack, progress=False)


def test_curves_take_arrays():
    model, epsilons = make(BatchNormNet).eval(), torch.linspace(0, 0.1, 3).numpy()
    assert list(accuracy_against_epsilon(model, [(IMAGES, LABELS)], epsilons, progress=False)) == list(epsilons)


def test_the_norms_of_advprop_are_still_its_own():
    model = make(BatchNormNet)
    model.bn = VarianceNorm(8)
    entprop.wrap(model).train()
    entprop.training_step(model, IMAGES, LABELS, method=AdvProp(PGD(steps=2)))
    assert (model.bn.recorded, model.bn.entprop_aux.recorded) == (1, 1)


def test_growth_and_jacobians_name_inference_mode():
    model = make(BatchNormNet).eval()
    with torch.inference_mode():
        with pytest.raises(ConfigurationError, match=r"torch.inference_mode\(False\)"):
            grow(model, list(zip(IMAGES, LABELS, strict=True)), progress=False)
        with pytest.raises(ConfigurationError, match=r"torch.inference_mode\(False\)"):
            input_jacobian(model, [(IMAGES, LABELS)], progress=False)
