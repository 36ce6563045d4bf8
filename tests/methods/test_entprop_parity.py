"""``training_step`` with EntProp against the naive float64 reference: every figure, gradient and buffer of one step."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import entprop_wrap as entprop
from entprop_wrap import EntProp, functional
from entprop_wrap.errors import ConfigurationError, NotWrappedError
from entprop_wrap.functional import uncertainty
from tests.methods.covering import covering, name_of
from tests.methods.parity import (
    BATCH,
    BLENDS,
    FRACTION,
    SELECTED,
    SPACES,
    TOLERANCE,
    FixedMixer,
    Pair,
    Rows,
    as_blend,
    assert_matches,
    batch_in,
    relative_error,
    run,
    seeded,
    telling_draw,
)
from tests.reference import entprop as reference
from tests.reference.models import CLASSES, MODELS, build, random_batch

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step", "ignore:Some labels hold several")

TABLE = {
    "kind": tuple(MODELS),
    "attack_steps": (0, 1, 3),
    "mixing": (None, *BLENDS),
    "weighting": ("per_image", "sum"),
    "soft": (False, True),
    "space": tuple(SPACES),
}


@pytest.mark.parametrize("case", covering(TABLE), ids=name_of)
def test_a_step_equals_the_reference(case):
    pair, space = Pair(case["kind"]), SPACES[case["space"]]
    images, labels = batch_in(space, soft=case["soft"])
    blend, where = BLENDS.get(case["mixing"]), case["mixing"][1] if case["mixing"] else "batch"
    mixer = blend and FixedMixer(blend)
    given = images.clone(), labels.clone()
    options = {"fraction": FRACTION, "attack_steps": case["attack_steps"], "weighting": case["weighting"]}

    out = run(pair, (images, labels), EntProp(mix=mixer, mix_on=where, **options), space)

    assert torch.equal(images, given[0])
    assert torch.equal(labels, given[1])
    assert images.grad is None
    assert not images.requires_grad
    if mixer:
        assert mixer.shapes == [(BATCH if where == "batch" else SELECTED, *images.shape[1:])]
    order = out.selected.tolist()
    expected = pair.reference(images, labels, **{f"{where}_blend": blend}, order=order, **options, **space)
    assert_matches(pair, out, expected)


# Single options -------------------------------------------------------------------------------------------------------


def unmixed(pair, images, labels, **options):
    """One unmixed step and its reference with the same options."""
    out = run(pair, (images, labels), EntProp(mix=None, **options))
    return out, pair.reference(images, labels, order=out.selected.tolist(), **options)


SIZES = [
    # steps, epsilon, step size
    (1, None, 8 / 255),  # the default epsilon, 1/255, holds a large step back
    (2, None, 8 / 255),  # here it is 3/255
    (1, 8 / 255, None),  # one step goes all the way
    (1, 8 / 255, 1 / 255),
    (3, 1.5 / 255, 1 / 255),  # the second step runs into epsilon
    (5, 4 / 255, None),  # steps of a sixth of epsilon
    (3, 32 / 255, 16 / 255),  # many pixels run into black or white
]


@pytest.mark.parametrize(("size", "kind"), list(zip(SIZES, itertools.cycle(MODELS), strict=False)), ids=str)
def test_epsilon_and_step_size(size, kind):
    steps, epsilon, step_size = size
    pair, (images, labels) = Pair(kind), random_batch(BATCH)
    options = {"fraction": FRACTION, "attack_steps": steps, "epsilon": epsilon, "step_size": step_size}
    out, expected = unmixed(pair, images, labels, **options)
    assert_matches(pair, out, expected)
    moved = (out.aux_images - images[out.selected]).abs().max().item()
    assert 0 < moved <= (epsilon or {1: 1, 2: 3}[steps] / 255) + 1e-12
    assert out.aux_images.min() >= 0
    assert out.aux_images.max() <= 1


@pytest.mark.parametrize(("size", "fraction", "selected"), [(7, 0.01, 2), (2, 0.2, 2), (5, 0.5, 3), (7, 1.0, 7)])
def test_how_many_samples_are_selected(size, fraction, selected):
    pair = Pair("batch_norm")
    out, expected = unmixed(pair, *random_batch(size), fraction=fraction)
    assert len(out.selected) == selected
    assert_matches(pair, out, expected)


@pytest.mark.parametrize(
    ("score", "theirs", "soft"),
    [
        (uncertainty.entropy, reference.entropy, False),
        (uncertainty.least_confidence, reference.confidence, True),
        (uncertainty.logit_margin, reference.margin, False),
        (uncertainty.logit_margin, reference.margin, True),
        (uncertainty.cross_entropy, lambda logits, label: reference.cross_entropy(logits, label).item(), False),
        (uncertainty.cross_entropy, lambda logits, label: reference.cross_entropy(logits, label).item(), True),
    ],
)
def test_uncertainty_scores(score, theirs, soft):
    pair, (images, labels) = Pair("batch_norm"), random_batch(BATCH, soft=soft)
    out = run(pair, (images, labels), EntProp(fraction=FRACTION, mix=None, uncertainty=score))
    expected = pair.reference(images, labels, fraction=FRACTION, uncertainty=theirs)  # most uncertain first
    assert_matches(pair, out, expected)
    scores = [theirs(row, label) for row, label in zip(out.logits, labels, strict=True)]
    assert relative_error(score(out.logits, labels), scores) < TOLERANCE


@pytest.mark.parametrize(("kind", "mix_on"), [("batch_norm", "batch"), ("layer_norm", "auxiliary")])
@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_drawn_mixes(name, kind, mix_on):
    """The same seed gives ``draw`` outside the step what the step itself draws."""
    pair, (images, labels) = Pair(kind), random_batch(BATCH)
    mixer = getattr(functional, name)(alpha=1.0)
    shape = images.shape if mix_on == "batch" else torch.Size((SELECTED, *images.shape[1:]))
    seed, drawn = telling_draw(mixer, shape)
    method = EntProp(fraction=FRACTION, mix=mixer, mix_on=mix_on)
    out = entprop.training_step(pair.model, images, labels, method=method, generator=seeded(seed))
    where = {f"{mix_on}_blend": as_blend(drawn, shape)}
    assert_matches(pair, out, pair.reference(images, labels, fraction=FRACTION, order=out.selected.tolist(), **where))


def test_a_loss_of_ones_own_serves_both_branches():
    pair, (images, labels) = Pair("batch_norm"), random_batch(BATCH)
    method, loss = EntProp(fraction=FRACTION, attack_steps=2, mix=None), nn.CrossEntropyLoss(label_smoothing=0.2)
    out = entprop.training_step(pair.model, images, labels, method=method, loss=loss)
    smoothed = 0.8 * F.one_hot(labels, CLASSES).double() + 0.2 / CLASSES
    options = {"fraction": FRACTION, "attack_steps": 2, "order": out.selected.tolist()}
    assert_matches(pair, out, pair.reference(images, smoothed, **options))


def test_defaults():
    """EntProp(): one step of 1/255 on the fifth of the batch that is most uncertain after MixUp of all of it."""
    pair, (images, labels) = Pair("batch_norm"), random_batch(13)
    seed, drawn = telling_draw(entprop.MixUp(alpha=1.0), images.shape)
    blend = as_blend(drawn, images.shape)
    out = entprop.training_step(pair.model, images, labels, generator=seeded(seed))
    assert len(out.selected) == 3
    assert_matches(pair, out, pair.reference(images, labels, batch_blend=blend, order=out.selected.tolist()))


def test_torchs_own_generator_is_the_default():
    images, labels = random_batch(BATCH)
    outs = []
    for given in (seeded(3), None):
        torch.manual_seed(3)
        outs.append(entprop.training_step(Pair("batch_norm").model, images, labels, generator=given))
    assert torch.equal(outs[0].aux_images, outs[1].aux_images)
    assert torch.equal(outs[0].loss, outs[1].loss)


def test_frozen_parameters_stay_without_gradients():
    """A frozen stem still has to pass the gradient of the pixels on."""
    pair = Pair("batch_norm")
    for name, parameter in pair.model.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "bn1.bias")))
    out, expected = unmixed(pair, *random_batch(BATCH), fraction=FRACTION, attack_steps=2)
    assert pair.model.conv1.weight.grad is None
    assert pair.model.bn1.bias.grad is None
    expected.main_gradients["conv1.weight"].zero_()
    expected.main_gradients["bn1.bias"].zero_()
    assert_matches(pair, out, expected)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_images_in_another_memory_layout(layout):
    pair, (images, labels) = Pair("batch_norm"), random_batch(BATCH)
    if layout == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    else:
        images = torch.cat([images, images], dim=3)[..., : images.shape[3]]
    assert_matches(pair, *unmixed(pair, images, labels, fraction=FRACTION, attack_steps=2))


class Output(dict):
    """A mapping with attributes, as the Hub's models return."""

    def __getattr__(self, name):
        return self[name]


@pytest.mark.parametrize("wrapper", [lambda logits: {"logits": logits}, lambda logits: Output(logits=logits)])
def test_models_that_return_more_than_a_tensor(wrapper):
    pair = Pair("batch_norm")
    pair.model.register_forward_hook(lambda module, args, output: wrapper(output))
    assert_matches(pair, *unmixed(pair, *random_batch(BATCH), fraction=FRACTION, attack_steps=2))


def test_no_switch_leaks_out_of_a_step():
    """Afterwards the model is its main network: unwrapped, it is the plain model after the same main pass."""
    pair, (images, labels) = Pair("mixed_norms"), random_batch(BATCH)
    out, expected = unmixed(pair, images, labels, fraction=FRACTION, attack_steps=2)
    assert_matches(pair, out, expected)
    pair.plain.load_state_dict({**pair.main, **expected.main_buffers})
    assert pair.model.training
    with torch.no_grad():
        assert torch.equal(pair.model.eval()(images), pair.plain.eval()(images))
        assert torch.equal(entprop.unwrap(pair.model)(images), pair.plain(images))


# Random selection -----------------------------------------------------------------------------------------------------

RANDOM = {"kind": tuple(MODELS), "attack_steps": (0, 1, 3), "fraction": (0.4, 0.7), "soft": (False, True)}


def step(model, batch, **options):
    return entprop.training_step(model, *batch, method=EntProp(**options), generator=seeded())


@pytest.mark.parametrize("case", covering(RANDOM), ids=name_of)
def test_random_selection(case):
    case = dict(case)
    kind, soft = case.pop("kind"), case.pop("soft")
    pair, (images, labels) = Pair(kind), random_batch(BATCH, soft=soft)
    out = step(pair.model, (images, labels), uncertainty=uncertainty.random, mix=None, **case)
    drawn = iter(torch.rand(BATCH, generator=seeded(), dtype=torch.float64).tolist())
    expected = pair.reference(images, labels, uncertainty=lambda logits, label: next(drawn), **case)
    assert_matches(pair, out, expected)


def test_random_scores_follow_the_generator_and_else_torchs_seed():
    logits = torch.zeros(500, 3)
    first, again = (uncertainty.random(logits, generator=seeded()) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, uncertainty.random(logits, generator=seeded(6)))
    torch.manual_seed(5)
    assert torch.equal(first, uncertainty.random(logits))
    assert first.shape == (500,)
    assert 0 <= first.min() < 0.02
    assert 0.98 < first.max() < 1
    assert len(first.unique()) == 500


class Noisy:
    """A score of one's own, as an object, that draws."""

    def __call__(self, logits, labels, *, generator=None):
        return uncertainty.entropy(logits) + torch.rand(len(logits), generator=generator)


def test_scores_that_draw_are_given_the_steps_generator():
    batch, chosen = random_batch(BATCH), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        chosen.append(step(Pair("layer_norm").model, batch, uncertainty=Noisy(), mix=None).selected.tolist())
    assert chosen[0] == chosen[1]


def test_scores_without_a_signature_are_called_with_two_arguments():
    built_in = torch.Tensor.sum  # written in C: inspect cannot say what it takes
    assert uncertainty.compute_scores(built_in, torch.ones(4, 3), -1).tolist() == [3.0] * 4


# Shared norms ---------------------------------------------------------------------------------------------------------

SHARED = {
    "kind": tuple(MODELS),
    "wrapped": (False, True),
    "attack_steps": (0, 1, 3),
    "weighting": ("per_image", "sum"),
    "mix": (None, "mixup"),
}


@pytest.mark.parametrize("case", covering(SHARED), ids=name_of)
def test_shared_norms(case):
    case = dict(case)
    kind, wrapped, mix = case.pop("kind"), case.pop("wrapped"), case.pop("mix")
    pair, (images, labels) = Pair(kind), random_batch(BATCH)
    model = pair.model if wrapped else build(kind)
    blend = BLENDS["mixup", "batch"] if mix else None
    method = EntProp(fraction=0.4, auxiliary=None, mix=blend and FixedMixer(blend), **case)
    assert method.auxiliaries == ()

    out = entprop.training_step(model, images, labels, method=method)

    expected = reference.step(
        pair.plain, pair.main, {}, images, labels, fraction=0.4, batch_blend=blend, order=out.selected.tolist(), **case
    )
    rows = Rows()
    for name in ("loss", "main_loss", "aux_loss", "logits", "aux_logits", "aux_images", "passes"):
        rows.add(name, getattr(out, name), getattr(expected, name))
    rows.add_model(model, expected.main_gradients, expected.main_buffers)
    rows.check()
    if wrapped:
        copies = [name for name, _ in model.named_parameters() if name not in pair.names]
        assert copies
        assert all(model.get_parameter(name).grad is None for name in copies)
        assert all(torch.equal(buffer, pair.auxiliary[name]) for name, buffer in pair.buffers()[1].items())


def test_statistics_survive_an_attack_that_fails():
    model, seen = build("batch_norm"), []

    def fail_in_the_third(module, args):
        seen.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        if len(seen) == 3:
            raise RuntimeError("no more")

    model.register_forward_pre_hook(fail_in_the_third)
    with pytest.raises(RuntimeError, match="no more"):
        step(model, random_batch(BATCH), auxiliary=None, attack_steps=3, mix=None)
    assert all(torch.equal(buffer, seen[0][name]) for name, buffer in model.named_buffers())


def test_few_images_warn_once_where_batch_norms_are_shared():
    model = build("batch_norm")
    with pytest.warns(UserWarning, match="Only 2 images a step go through the batch norms a second time"):
        step(model, random_batch(BATCH), auxiliary=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, random_batch(BATCH), auxiliary=None)
        step(build("layer_norm"), random_batch(BATCH), auxiliary=None)


def test_eight_images_are_enough_for_the_copies_of_batch_norms():
    for number, warned in ((7, True), (8, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(Pair("batch_norm").model, random_batch(10), fraction=number / 10)
        assert [f"Only {number} images a step" in str(one.message) for one in caught] == [True] * warned


def test_copies_are_asked_for_by_name_only():
    with pytest.raises(NotWrappedError):
        step(build("batch_norm"), random_batch(BATCH))
    with pytest.raises(ConfigurationError, match="None for shared norms"):
        EntProp(auxiliary=False)
