"""AdvProp, Fast AdvProp, MixProp, adversarial training and vanilla training against naive float64 references.

Each table has every pair of values of any two options.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import PGD, uniform_start
from entprop_wrap.functional.losses import Regularised, log_probabilities, mean_entropy, smooth
from entprop_wrap.methods import AdversarialTraining, AdvProp, FastAdvProp, MixProp, Vanilla
from entprop_wrap.methods.adversarial_training import divergence
from entprop_wrap.methods.advprop import wrong_labels
from tests.methods.covering import covering, name_of
from tests.methods.parity import (
    BATCH,
    BLENDS,
    SPACES,
    FixedMixer,
    Pair,
    Rows,
    assert_matches,
    batch_in,
    run,
    seeded,
)
from tests.reference import adversarial_training as adversarial_training_reference
from tests.reference import advprop as advprop_reference
from tests.reference import fast_advprop as fast_advprop_reference
from tests.reference import mixprop as mixprop_reference
from tests.reference import networks
from tests.reference.models import CLASSES, MODELS, build, random_batch

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")


@dataclass(frozen=True)
class Watched:
    """An attack that remembers where it took the images."""

    attack: PGD
    results: list = field(default_factory=list, compare=False)

    @property
    def steps(self):
        return self.attack.steps

    def run(self, images, gradient, space, generator):
        self.results.append(self.attack.run(images, gradient, space, generator))
        return self.results[-1]


# AdvProp --------------------------------------------------------------------------------------------------------------

ADVPROP = {
    "kind": tuple(MODELS),
    "targeted": (False, True),
    "attack_statistics": ("running", "batch"),
    "weight": (1.0, 0.3),
    "random_start": (True, False),
    "steps": (1, 3),
    "space": tuple(SPACES),
}


@pytest.mark.parametrize("case", covering(ADVPROP), ids=name_of)
def test_advprop(case):
    pair, space = Pair(case["kind"]), SPACES[case["space"]]
    images, labels = batch_in(space)
    limits = {"epsilon": 4 / 255, "step_size": 1.5 / 255, "steps": case["steps"]}
    options = {name: case[name] for name in ("attack_statistics", "weight")}
    method = AdvProp(attack=PGD(random_start=case["random_start"], **limits), targeted=case["targeted"], **options)

    out = run(pair, (images, labels), method, space)

    draws = seeded()
    wrong = wrong_labels(labels, CLASSES, draws) if case["targeted"] else None
    start = uniform_start(images, 4 / 255, entprop.PixelSpace(**space), draws) if case["random_start"] else None
    expected = advprop_reference.step(
        pair.plain, pair.main, pair.auxiliary, images, labels, start=start, wrong=wrong, **limits, **options, **space
    )
    assert_matches(pair, out, expected)


def test_advprop_defaults_and_soft_labels():
    pair = Pair("batch_norm")
    images, labels = random_batch(BATCH, soft=True)
    out = run(pair, (images, labels), AdvProp())
    start = uniform_start(images, 4 / 255, entprop.PixelSpace(), seeded())
    expected = advprop_reference.step(pair.plain, pair.main, pair.auxiliary, images, labels, start=start)
    assert_matches(pair, out, expected)


def test_a_targeted_attack_refuses_soft_labels_before_anything_runs():
    pair = Pair("batch_norm")
    with pytest.raises(ConfigurationError, match="targeted=False"):
        run(pair, random_batch(BATCH, soft=True), AdvProp(targeted=True))
    assert all(p.grad is None for p in pair.model.parameters())
    for buffers, before in zip(pair.buffers(), (pair.main, pair.auxiliary), strict=True):
        assert all(torch.equal(buffer, before[name]) for name, buffer in buffers.items())


@pytest.mark.parametrize("classes", [2, 5])
def test_wrong_labels_are_every_other_class_alike(classes):
    labels = torch.arange(classes).repeat_interleave(2000)
    wrong = wrong_labels(labels, classes, seeded())
    counts = torch.zeros(classes, classes).index_put_((labels, wrong), torch.ones(len(labels)), accumulate=True)
    assert not counts.diagonal().any()
    others = counts[~torch.eye(classes, dtype=torch.bool)]
    assert (others - 2000 / (classes - 1)).abs().max() < 5 * math.sqrt(2000 / (classes - 1))


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_a_uniform_start_is_uniform_and_stays_in_the_ball_and_in_valid_pixels(space):
    images, _ = batch_in(space, size=64)
    pixels = entprop.PixelSpace(**space)
    start = uniform_start(images, 8 / 255, pixels, seeded())
    assert torch.equal(start, uniform_start(images, 8 / 255, pixels, seeded()))
    mean, std = (images.new_tensor(space[name]).view(3, 1, 1) for name in ("mean", "std"))
    before, after = images * std + mean, start * std + mean
    assert after.min() >= -1e-12
    assert after.max() <= 1 + 1e-12
    moved = (after - before)[(before > 0.05) & (before < 0.95)] / (8 / 255)
    assert moved.abs().max() <= 1 + 1e-12
    quarters = torch.histc(moved, 4, -1, 1) / len(moved)
    assert (quarters - 0.25).abs().max() < 0.02


# Fast AdvProp ---------------------------------------------------------------------------------------------------------

FAST_ADVPROP = {
    "kind": tuple(MODELS),
    "size": (4, 5, 7, 10),
    "fraction": (0.2, 0.5, 0.9),
    "beta": (0.5, 0.3),
    "epsilon": (1 / 255, 32 / 255),
    "soft": (False, True),
    "space": tuple(SPACES),
}


ADVERSARIAL_IMAGES = {  # by fraction and batch size
    0.2: {4: 2, 5: 2, 7: 2, 10: 2},
    0.5: {4: 2, 5: 3, 7: 4, 10: 5},
    0.9: {4: 2, 5: 3, 7: 5, 10: 8},
}


@pytest.mark.parametrize("case", covering(FAST_ADVPROP), ids=name_of)
def test_fast_advprop(case):
    pair, space = Pair(case["kind"]), SPACES[case["space"]]
    images, labels = batch_in(space, case["size"], case["soft"])
    options = {name: case[name] for name in ("fraction", "beta", "epsilon")}
    out = run(pair, (images, labels), FastAdvProp(**options), space)
    noisy = uniform_start(
        images[-ADVERSARIAL_IMAGES[case["fraction"]][case["size"]] :],
        case["epsilon"],
        entprop.PixelSpace(**space),
        seeded(),
    )
    expected = fast_advprop_reference.step(
        pair.plain, pair.main, pair.auxiliary, images, labels, noisy=noisy, **options, **space
    )
    assert_matches(pair, out, expected)


def test_fast_advprop_rebalances_frozen_and_shared_parameters_alike():
    """A frozen main norm has no gradient to rescale, and a norm left out of the switch counts as shared."""
    plain = build("batch_norm")
    model = entprop.wrap(plain, exclude="bn2")
    model.bn1.weight.requires_grad_(False)
    images, labels = random_batch(10)
    entprop.training_step(model, images, labels, method=FastAdvProp(fraction=0.4), generator=seeded())
    assert model.bn1.weight.grad is None
    assert model.bn1.entprop_aux.bias.grad is not None
    assert model.bn2.num_batches_tracked == 3 + 3


@pytest.mark.parametrize("size", [2, 3])
def test_fast_advprop_refuses_batches_that_it_cannot_split(size):
    pair = Pair("batch_norm")
    with pytest.raises(ConfigurationError, match="at least 4"):
        run(pair, random_batch(size), FastAdvProp())


# MixProp --------------------------------------------------------------------------------------------------------------

MIXPROP = {"kind": tuple(MODELS), "mix": ("mixup", "cutmix"), "weight": (1.0, 0.3), "soft": (False, True)}


@pytest.mark.parametrize("case", covering(MIXPROP), ids=name_of)
def test_mixprop(case):
    pair = Pair(case["kind"])
    images, labels = random_batch(BATCH, soft=case["soft"])
    blend = BLENDS[case["mix"], "batch"]
    out = run(pair, (images, labels), MixProp(mix=FixedMixer(blend), weight=case["weight"]))
    expected = mixprop_reference.step(
        pair.plain, pair.main, pair.auxiliary, images, labels, blend=blend, weight=case["weight"]
    )
    assert_matches(pair, out, expected)


# Adversarial training -------------------------------------------------------------------------------------------------

ADVERSARIAL = {
    "model": tuple(MODELS),
    "kind": ("pgd", "trades"),
    "clean_weight": (0.0, 0.3),
    "entropy_weight": (0.0, 0.5),
    "label_smoothing": (0.0, 0.1),
    "regularise": ("adversarial", "clean", "both"),
    "steps": (1, 3),
    "soft": (False, True),
    "space": tuple(SPACES),
}


def has_an_effect(row):
    """Whether no option is given that the loss does not contain."""
    if row["kind"] == "trades":
        return not row["clean_weight"] and not (row["label_smoothing"] and row["regularise"] == "adversarial")
    without = not row["clean_weight"] and row["regularise"] == "clean"
    return not (without and (row["entropy_weight"] or row["label_smoothing"]))


#: Of three options at once, which pairs of options need not hold.
TRADES_OF_FLAT_PREDICTIONS = [
    {
        **{name: values[0] for name, values in ADVERSARIAL.items()},
        "kind": "trades",
        "entropy_weight": 0.5,
        "regularise": on,
    }
    for on in ("adversarial", "both")
]


@pytest.mark.parametrize("case", [*covering(ADVERSARIAL, has_an_effect), *TRADES_OF_FLAT_PREDICTIONS], ids=name_of)
def test_adversarial_training(case):
    pair, space = Pair(case["model"]), SPACES[case["space"]]
    images, labels = batch_in(space, soft=case["soft"])
    limits = {"epsilon": 8 / 255, "step_size": 3 / 255, "steps": case["steps"]}
    names = ("kind", "clean_weight", "entropy_weight", "label_smoothing", "regularise")
    options = {name: case[name] for name in names}
    attack = Watched(PGD(**limits))

    out = run(pair, (images, labels), AdversarialTraining(attack=attack, beta=4.0, **options), space)

    expected = adversarial_training_reference.step(
        pair.plain,
        pair.main,
        pair.auxiliary,
        images,
        labels,
        start=uniform_start(images, 8 / 255, entprop.PixelSpace(**space), seeded()),
        beta=4.0,
        **limits,
        **options,
        **space,
    )
    assert_matches(pair, out, expected, hardened=attack.results[0])


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "trades", "clean_weight": 0.5},
        {"kind": "trades", "label_smoothing": 0.1, "regularise": "adversarial"},
        {"label_smoothing": 0.1, "regularise": "clean"},
        {"entropy_weight": 0.1, "regularise": "clean"},
        {"kind": "trades", "attack": PGD(random_start=False)},
    ],
    ids=str,
)
def test_options_without_an_effect_are_refused(options):
    with pytest.raises(ConfigurationError, match=r"clean_weight|regularise|random_start"):
        AdversarialTraining(**options)


@pytest.mark.parametrize("method", [AdvProp, AdversarialTraining])
def test_an_attack_that_is_none_is_refused(method):
    for attack in (PGD, 4 / 255, None):
        with pytest.raises(ConfigurationError, match=r"attack.*PGD\("):
            method(attack=attack)


def test_a_mixer_that_is_none_is_refused():
    for mix in (entprop.MixUp, None, 0.2):
        with pytest.raises(ConfigurationError, match=r"mix.*MixUp\("):
            MixProp(mix=mix)


# Vanilla --------------------------------------------------------------------------------------------------------------


VANILLA = {
    "kind": ("batch_norm", "layer_norm"),
    "label_smoothing": (0.0, 0.1),
    "entropy_weight": (0.0, 0.3),
    "soft": (False, True),
    "wrapped": (False, True),
}


@pytest.mark.parametrize("case", covering(VANILLA), ids=name_of)
def test_vanilla(case):
    pair, (images, labels) = Pair(case["kind"]), random_batch(BATCH, soft=case["soft"])
    model = pair.model if case["wrapped"] else build(case["kind"])
    smoothing, weight = case["label_smoothing"], case["entropy_weight"]
    out = entprop.training_step(model, images, labels, method=Vanilla(smoothing, weight))

    logits = pair.plain(images)
    mean_entropy = sum(networks.entropy(row) for row in logits) / BATCH
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing) - weight * mean_entropy
    loss.backward()
    rows = Rows()
    rows.add("loss", out.loss, loss.detach())
    gradients = {name: parameter.grad for name, parameter in pair.plain.named_parameters()}
    rows.add_model(model, gradients, dict(pair.plain.named_buffers()))
    rows.check()
    assert (out.aux_loss, out.passes) == (None, 1)
    if case["wrapped"]:
        copies = [p for name, p in model.named_parameters() if name not in pair.names]
        assert copies
        assert all(p.grad is None for p in copies)
        assert all(torch.equal(buffer, pair.auxiliary[name]) for name, buffer in pair.buffers()[1].items())


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smooth(dtype):
    labels = torch.tensor([0, 3, 1])
    smoothed = smooth(labels, 0.1, 4, dtype)
    assert smoothed.dtype == dtype
    expected = torch.full((3, 4), 0.025, dtype=dtype)
    expected[range(3), labels] = 0.925
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(smoothed, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(smooth(F.one_hot(labels, 4).to(dtype), 0.1, 4, dtype), expected, rtol=tolerance, atol=0)


def test_the_entropy_bonus_of_a_certain_model_has_a_gradient():
    """In float32 the probability of a logit 104 below the largest is zero, whose logarithm is not."""
    logits = torch.tensor([[0.0, 200.0, -300.0], [1.0, 2.0, 3.0]], requires_grad=True)
    loss = Regularised(F.cross_entropy, entropy_weight=0.5)
    value = loss(logits, torch.tensor([1, 0]))
    value.backward()
    assert logits.grad.isfinite().all()
    exact = logits.detach().double().requires_grad_()
    reference = F.cross_entropy(exact, torch.tensor([1, 0]))
    reference = reference - 0.5 * sum(networks.entropy(row) for row in exact) / 2
    reference.backward()
    torch.testing.assert_close(value.double(), reference, rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_a_class_that_is_masked_counts_for_nothing():
    found = []
    for masked in (torch.full((4, 1), -torch.inf), torch.empty(4, 0)):
        seen = torch.linspace(-1, 2, 24).view(2, 4, 3).requires_grad_()
        logits, other = (torch.cat([part, masked], dim=1) for part in seen)
        value = mean_entropy(logits) + divergence(log_probabilities(logits), other)
        value.backward()
        found.append((value.detach(), seen.grad))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("options", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"entropy_weight": -1.0}])
@pytest.mark.parametrize("method", [Vanilla, AdversarialTraining])
def test_coefficients_out_of_range_are_refused(method, options):
    with pytest.raises(ConfigurationError, match=r"label_smoothing|entropy_weight"):
        method(**options)
