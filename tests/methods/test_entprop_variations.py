"""Variations of EntProp's step against the same reference: random uncertainty, a threshold, and shared norms."""

import warnings

import pytest
import torch

import entprop_wrap as entprop
from entprop_wrap import EntProp
from entprop_wrap.errors import ConfigurationError, NotWrappedError
from entprop_wrap.functional import uncertainty
from tests.methods.covering import covering, name_of
from tests.methods.test_entprop_parity import (
    BLENDS,
    FixedMixer,
    Pair,
    assert_equal,
    assert_step_matches,
    relative_error,
)
from tests.reference import entprop as reference
from tests.reference.models import MODELS, build, random_batch

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

BATCH = 7


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def step(model, batch, **options):
    return entprop.training_step(model, *batch, method=EntProp(**options), generator=seeded())


# Random selection -----------------------------------------------------------------------------------------------------

RANDOM = {"kind": tuple(MODELS), "attack_steps": (0, 1, 3), "fraction": (0.4, 0.7), "soft": (False, True)}


@pytest.mark.parametrize("case", covering(RANDOM), ids=name_of)
def test_random_selection(case):
    case = dict(case)
    kind, soft = case.pop("kind"), case.pop("soft")
    pair, (images, labels) = Pair(kind), random_batch(BATCH, soft=soft)
    out = step(pair.model, (images, labels), uncertainty=uncertainty.random, mix=None, **case)
    drawn = iter(torch.rand(BATCH, generator=seeded(), dtype=torch.float64).tolist())
    expected = pair.reference(images, labels, uncertainty=lambda logits, label: next(drawn), **case)
    assert_step_matches(pair, out, expected)


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


def test_every_sample_is_as_likely_to_be_selected():
    generator, counts = seeded(), torch.zeros(10)
    for _ in range(2000):
        scores = uncertainty.compute_scores(uncertainty.random, torch.zeros(10, 3), torch.zeros(10), generator)
        counts[uncertainty.top_k(scores, 3)] += 1
    assert (counts / 2000 - 0.3).abs().max() < 0.05


class Noisy:
    """A score of one's own, as an object, that draws."""

    def __call__(self, logits, labels, *, generator=None):
        return uncertainty.entropy(logits) + torch.rand(len(logits), generator=generator)


@pytest.mark.parametrize("score", [Noisy(), uncertainty.random])
def test_scores_that_draw_are_given_the_steps_generator(score):
    images, labels = random_batch(BATCH)
    chosen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        chosen.append(step(Pair("layer_norm").model, (images, labels), uncertainty=score, mix=None).selected.tolist())
    assert chosen[0] == chosen[1]


def test_scores_without_a_signature_are_called_with_two_arguments():
    built_in = torch.Tensor.sum  # written in C: inspect cannot say what it takes
    assert uncertainty.compute_scores(built_in, torch.ones(4, 3), -1).tolist() == [3.0] * 4


# A threshold ----------------------------------------------------------------------------------------------------------

THRESHOLD = {
    "kind": tuple(MODELS),
    "above": (0, 1, 2, 3, 5, 7),
    "fraction": (0.2, 0.6, 1.0),
    "attack_steps": (0, 1, 3),
    "weighting": ("per_image", "sum"),
    "mix": (None, "mixup"),
}


@pytest.mark.parametrize("case", covering(THRESHOLD), ids=name_of)
def test_a_threshold(case):
    case = dict(case)
    kind, above, mix = case.pop("kind"), case.pop("above"), case.pop("mix")
    pair, (images, labels) = Pair(kind), random_batch(BATCH)
    blend = BLENDS["mixup", "batch"] if mix else None
    with torch.no_grad():
        logits = build(kind)(blend(images) if blend else images)
    scores = sorted((reference.entropy(row, None) for row in logits), reverse=True)
    threshold = (([scores[0] + 1, *scores])[above] + [*scores, scores[-1] - 1][above]) / 2  # `above` scores are higher

    out = step(pair.model, (images, labels), threshold=threshold, mix=blend and FixedMixer(blend), **case)

    assert len(out.selected) == max(2, min(above, uncertainty.num_selected(BATCH, case["fraction"])))
    assert out.passes == pytest.approx(1 + len(out.selected) * max(case["attack_steps"], 1) / BATCH)
    expected = pair.reference(
        images, labels, threshold=threshold, batch_blend=blend, order=out.selected.tolist(), **case
    )
    assert_step_matches(pair, out, expected)


def test_scores_at_the_threshold_are_not_above_it():
    def score(logits, labels):
        return torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 0.0, 2.0])

    out = step(Pair("layer_norm").model, random_batch(BATCH), fraction=1.0, uncertainty=score, threshold=2.0, mix=None)
    assert out.selected.tolist() == [4, 1]
    out = step(Pair("layer_norm").model, random_batch(BATCH), fraction=1.0, uncertainty=score, threshold=1.9, mix=None)
    assert out.selected.tolist()[:2] == [4, 1]
    assert sorted(out.selected.tolist()[2:]) == [2, 3, 6]


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), "1", True, torch.tensor(1.0)])
def test_a_threshold_is_a_finite_number(threshold):
    with pytest.raises(ConfigurationError, match="threshold"):
        EntProp(threshold=threshold)


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
    rows = {
        name: (1.0, relative_error(getattr(out, name), getattr(expected, name)))
        for name in ("loss", "main_loss", "aux_loss", "logits", "aux_logits", "aux_images", "passes")
    }
    for name, gradient in expected.main_gradients.items():
        rows[f"gradient {name}"] = (gradient.norm().item(), relative_error(model.get_parameter(name).grad, gradient))
    for name, buffer in expected.main_buffers.items():
        rows[f"buffer {name}"] = (buffer.double().norm().item(), relative_error(model.get_buffer(name), buffer))
    assert_equal(rows)
    if wrapped:
        copies = [name for name, _ in model.named_parameters() if name not in pair.names]
        assert copies
        assert all(model.get_parameter(name).grad is None for name in copies)
        assert all(torch.equal(buffer, pair.auxiliary[name]) for name, buffer in pair.buffers()[1].items())


def test_statistics_survive_an_attack_that_fails():
    model = build("batch_norm")
    images, labels = random_batch(BATCH)
    seen = []

    def fail_in_the_third(module, args):
        seen.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        if len(seen) == 3:
            raise RuntimeError("no more")

    model.register_forward_pre_hook(fail_in_the_third)
    with pytest.raises(RuntimeError, match="no more"):
        step(model, (images, labels), auxiliary=None, attack_steps=3, mix=None)
    assert all(torch.equal(buffer, seen[0][name]) for name, buffer in model.named_buffers())


def test_few_images_warn_once_where_batch_norms_are_shared():
    model = build("batch_norm")
    with pytest.warns(UserWarning, match="Only 2 images a step go through the batch norms a second time"):
        step(model, random_batch(BATCH), auxiliary=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, random_batch(BATCH), auxiliary=None)
        step(build("layer_norm"), random_batch(BATCH), auxiliary=None)


def test_copies_are_asked_for_by_name_only():
    with pytest.raises(NotWrappedError):
        step(build("batch_norm"), random_batch(BATCH))
    with pytest.raises(ConfigurationError, match="None for shared norms"):
        EntProp(auxiliary=False)
