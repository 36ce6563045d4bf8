"""AUROC, domain gap, Fréchet distance and Jacobians against naive references."""

import json
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch.utils.checkpoint import checkpoint

import entprop_wrap as entprop
from entprop_wrap import EntProp
from entprop_wrap.diagnostics import (
    domain_gap,
    entropy_stages,
    feature_distance,
    input_jacobian,
    selection_ood,
)
from entprop_wrap.diagnostics.feature_distance import _frechet
from entprop_wrap.diagnostics.method_stages import Observer
from entprop_wrap.diagnostics.selection_ood import _auroc, _fpr95
from entprop_wrap.errors import (
    AuxiliaryNameError,
    ConfigurationError,
    ModelOutputError,
    NotWrappedError,
    UnsupportedModelError,
)
from tests.helpers import small_classifier
from tests.helpers.diagnosed import SPACE, images, loader, make, untouched
from tests.reference import diagnostics as reference
from tests.reference.models import CLASSES

OPTIONS = {"pixel_space": SPACE, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:The stage")

# Out of distribution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1), (20, 7), (101, 33)])
@pytest.mark.parametrize("ties", [True, False])
def test_auroc_and_fpr95_against_sklearn(sizes, ties):
    generator = torch.Generator().manual_seed(sum(sizes))
    inside, outside = (torch.randn(size, generator=generator).double() for size in sizes)
    outside += 0.5
    if ties:
        inside, outside = inside.round(), outside.round()
    labels, scores = np.r_[np.zeros(sizes[0]), np.ones(sizes[1])], torch.cat([inside, outside]).numpy()
    assert _auroc(inside, outside) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    false, true, _ = roc_curve(1 - labels, -scores)
    assert _fpr95(inside, outside) == pytest.approx(false[np.argmax(true >= 0.95)], abs=1e-12)


def test_selection_against_other_data():
    model, data, other = make("ln"), loader(24, 8), loader(30, 10, seed=9)
    method = EntProp(fraction=0.25)
    with untouched(model):
        found = selection_ood(model, data, method=method, ood=other, seed=2, **OPTIONS)
    observer, candidates, selected = Observer(model, method, SPACE, 2), [], []
    for batch, labels in data:
        stages = observer.stages(batch, labels)
        candidates.append(stages.candidates)
        selected.append(stages.candidates[stages.selected])
    energies = [
        [-float(np.log(np.exp(row).sum())) for row in model(torch.cat(group)).detach().numpy()]
        for group in (candidates, selected, [images(30, seed=9)])
    ]
    score = found.scores["energy"]
    expected = [reference.auroc(group, energies[2]) for group in energies[:2]]
    assert score.auroc["random"].value == pytest.approx(expected[0], abs=1e-9)
    assert score.auroc["selected"].value == pytest.approx(expected[1], abs=1e-9)
    assert score.closer.value == pytest.approx(expected[0] - expected[1], abs=1e-9)
    assert score.fpr95["selected"].value == pytest.approx(reference.fpr95(energies[1], energies[2]), abs=1e-9)
    assert score.auroc["random"].low <= score.auroc["random"].value <= score.auroc["random"].high
    assert (found.images, found.selected, found.ood) == (24, 6, 30)
    json.dumps(found.to_dict(), allow_nan=False)


def test_selection_against_corruptions():
    model, space = small_classifier.classifier(), small_classifier.SPACE
    options = {"pixel_space": space, "progress": False, "corruptions": ("fog", "contrast"), "severities": (5,)}
    found = selection_ood(model, small_classifier.loader(24, 8), **options)
    assert found.ood == 48
    assert found == selection_ood(model, small_classifier.loader(24, 8), **options)
    assert found.scores["entropy"].closer.value > 0
    assert "fog 5" in found.to_markdown()
    with pytest.raises(ConfigurationError, match="Did you mean 'fog'"):
        selection_ood(model, small_classifier.loader(), **{**options, "corruptions": ("fogg",)})


# Domain gap ----------------------------------------------------------------------------------------------------------


def test_the_gap_of_batch_norms():
    model = make("bn")
    layers = {gap.layer: gap for gap in domain_gap(model).layers}
    assert list(layers) == ["bn1", "bn2"]
    for name, gap in layers.items():
        norm = model.get_submodule(name)
        copy = norm.get_submodule("entprop_aux")
        main, aux = norm.weight.tolist(), copy.weight.tolist()
        size = (sum(a * a for a in main) ** 0.5 + sum(a * a for a in aux) ** 0.5) / 2
        expected = sum((a - b) ** 2 for a, b in zip(main, aux, strict=True)) ** 0.5 / size
        assert gap.parameters["weight"] == pytest.approx(expected, rel=1e-12)
        columns = (norm.running_mean, norm.running_var + norm.eps, copy.running_mean, copy.running_var + norm.eps)
        divergences = [reference.symmetric_divergence(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
        assert gap.statistics == pytest.approx(sum(divergences) / len(divergences), rel=1e-9)
        assert gap.statistics > 0


def test_the_gap_of_layer_norms_and_of_fresh_copies():
    layers = domain_gap(make("ln")).layers
    assert len(layers) == 3
    assert all(gap.statistics is None and gap.parameters["bias"] > 0 for gap in layers)
    fresh = domain_gap(entprop.wrap(make("bn", wrapped=False), auxiliaries=("a", "b"))).layers
    assert [(gap.layer, gap.auxiliary) for gap in fresh[:2]] == [("bn1", "a"), ("bn1", "b")]
    assert all(gap.statistics == 0 and set(gap.parameters.values()) == {0.0} for gap in fresh)
    with pytest.raises(NotWrappedError):
        domain_gap(make("bn", wrapped=False))


# Fréchet distance ----------------------------------------------------------------------------------------------------


def features(number, dimensions, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=generator).double()
    return torch.randn(number, dimensions, generator=generator).double() @ mix + 0.3 * seed


@pytest.mark.parametrize(("number", "other", "dimensions"), [(50, 70, 6), (40, 30, 20)])
def test_the_distance_against_a_matrix_square_root(number, other, dimensions):
    a, b = features(number, dimensions, 1), features(other, dimensions, 2)
    assert _frechet(a, b) == pytest.approx(reference.frechet(a, b), rel=1e-9)
    assert _frechet(a, a) == pytest.approx(0, abs=1e-9 * float(a.square().sum()))
    assert _frechet(a, b) == pytest.approx(_frechet(b, a), rel=1e-9)
    # Singular covariances, within a plane, where the distance is known.
    axes = torch.linalg.qr(torch.randn(2 * dimensions, dimensions).double()).Q.T
    assert _frechet(a @ axes, b @ axes) == pytest.approx(reference.frechet(a, b), rel=1e-9)


def test_distances_of_a_method_s_images():
    model, data = make("bn"), loader(24, 8)
    method = EntProp(fraction=0.5)
    with untouched(model):
        found = feature_distance(model, data, method=method, seed=3, **OPTIONS)
    observer, clean, hardened = Observer(model, method, SPACE, 3), [], []
    head = {}
    model.fc.register_forward_pre_hook(lambda module, args: head.update(given=args[0].detach()))
    for batch, labels in data:
        stages = observer.stages(batch, labels)
        model(batch)
        clean.append(head["given"])
        with entprop.auxiliary(model):
            model(stages.images["perturbed"])
        hardened.append(head["given"])
    expected = reference.frechet(torch.cat(clean), torch.cat(hardened))
    assert found.distances["perturbed, auxiliary"] == pytest.approx(expected, rel=1e-6)
    assert list(found.distances) == ["mixed", "selected", "perturbed", "perturbed, auxiliary"]
    assert (found.layer, found.dimensions, found.images["clean"], found.images["selected"]) == ("fc", 8, 24, 12)
    assert found.floor > 0
    plain = feature_distance(make("ln", wrapped=False), data, layer="mlp", **OPTIONS)
    assert list(plain.distances) == ["mixed", "selected", "perturbed"]
    json.dumps(plain.to_dict(), allow_nan=False)


def test_distances_of_nonsense_are_refused():
    with pytest.raises(ConfigurationError, match=r"at least 4 images .* found 3"):
        feature_distance(make(), loader(3), **OPTIONS)
    with pytest.raises(ConfigurationError, match="no layer"):
        feature_distance(make(), loader(), layer="head.fc", **OPTIONS)


# Jacobians -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["bn", "ln"])
@pytest.mark.parametrize("domain", [None, "aux"])
def test_jacobians_entry_by_entry_and_by_torch_func(net, domain, monkeypatch):
    model, batch = make(net), images(5)
    monkeypatch.setattr(
        sys.modules["entprop_wrap.diagnostics.input_jacobian"], "_ENTRIES", 2 * CLASSES * batch[0].numel()
    )
    with untouched(model):
        found = input_jacobian(model, loader(5, 3), auxiliary=domain, **OPTIONS)
    with entprop.auxiliary(model, domain):
        matrices = [reference.jacobian(model, image, SPACE.std) for image in batch]
        (whole,) = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), (batch,))
    np.testing.assert_allclose(found.frobenius, [np.linalg.norm(m) for m in matrices], rtol=1e-9)
    np.testing.assert_allclose(found.spectral, [np.linalg.norm(m, 2) for m in matrices], rtol=1e-7)
    scaled = whole / torch.tensor(SPACE.std, dtype=torch.float64).view(1, 1, 3, 1, 1)
    np.testing.assert_allclose(found.frobenius, scaled.square().sum((0, 2, 3, 4)).sqrt(), rtol=1e-9)
    assert found.frobenius_mean.value == pytest.approx(np.mean(found.frobenius))
    assert len(found.spectral) == 5


def test_jacobians_in_another_pixel_space_are_the_same():
    model, raw = make("bn"), (images(4) - SPACE.bounds(images(1))[0]) / SPACE.scale(images(1))

    class Normalising(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixels):
            return self.model(pixels * SPACE.scale(pixels) + SPACE.bounds(pixels)[0])

    labels = torch.zeros(4).long()
    inside = input_jacobian(Normalising().eval(), [(raw.clamp(0, 1), labels)], progress=False)
    outside = input_jacobian(model, [(images(4), labels)], **OPTIONS)
    np.testing.assert_allclose(inside.frobenius, outside.frobenius, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_jacobians_under_activation_checkpointing():
    class Checkpointed(torch.nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.model, self.reentrant = make("bn"), reentrant

        def forward(self, pixels):
            return checkpoint(self.model, pixels, use_reentrant=self.reentrant)

    found = input_jacobian(Checkpointed(False).eval(), loader(5, 3), **OPTIONS)
    assert found == input_jacobian(make("bn"), loader(5, 3), **OPTIONS)
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        input_jacobian(Checkpointed(True).eval(), loader(5, 3), **OPTIONS)


def test_jacobians_that_cannot_be_are_refused():
    with pytest.raises(AuxiliaryNameError):
        input_jacobian(make(), loader(), auxiliary="adv", **OPTIONS)
    with pytest.raises(ConfigurationError, match="training mode"):
        input_jacobian(make().train(), loader(), **OPTIONS)
    broken = make()
    broken.fc.weight.data.fill_(torch.inf)
    with pytest.raises(ModelOutputError, match="NaN or infinite"):
        input_jacobian(broken, loader(), **OPTIONS)
    with pytest.raises(ModelOutputError, match="NaN or infinite"):
        entropy_stages(broken, loader(), **OPTIONS)
    biased = make()
    with torch.no_grad():
        [*biased.parameters()][-1].fill_(torch.nan)  # the last bias: the Jacobian does not know of it
    with pytest.raises(ModelOutputError, match=r"logits of .* are NaN or infinite"):
        input_jacobian(biased, loader(), **OPTIONS)
