"""The stages are those of the method's own step, the entropies those of the model, and nothing changes."""

import copy
import json
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import entprop_wrap as entprop
from entprop_wrap import EntProp, MixUp
from entprop_wrap.diagnostics import entropy_stages
from entprop_wrap.diagnostics.method_stages import Observer
from entprop_wrap.errors import AuxiliaryNameError, ConfigurationError, DataError, LabelError, UnsupportedModelError
from entprop_wrap.functional.uncertainty import random as random_score
from entprop_wrap.methods import Vanilla
from entprop_wrap.utils.statistics import bootstrap, mean_difference, mean_of
from tests.helpers.diagnosed import SPACE, images, loader, make, untouched
from tests.reference import diagnostics as reference
from tests.reference.models import CLASSES

pytestmark = pytest.mark.filterwarnings("ignore:The stage", "ignore:Perturbed images")
OPTIONS = {"pixel_space": SPACE, "progress": False}
METHODS = {
    "default": EntProp(),
    "n3": EntProp(fraction=0.6, attack_steps=3),
    "auxiliary": EntProp(fraction=0.5, mix_on="auxiliary", attack_steps=2),
    "no mix": EntProp(mix=None),
    "no attack": EntProp(attack_steps=0),
    "own norms": EntProp(auxiliary=None),
    "random": EntProp(uncertainty=random_score),
}


@pytest.mark.parametrize(("net", "name"), [*(("bn", name) for name in METHODS), ("ln", "n3")])
def test_stages_are_those_of_a_training_step(net, name):
    method, model, batch, labels = METHODS[name], make(net), images(12), torch.arange(12) % CLASSES
    observer = Observer(model, method, SPACE, seed=4)
    first, second = (observer.stages(batch, labels) for _ in range(2))
    twin, generator = copy.deepcopy(model).train(), torch.Generator().manual_seed(4)
    buffers = {name: value.clone() for name, value in twin.named_buffers()}
    for stages in (first, second):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = entprop.training_step(twin, batch, labels, method=method, pixel_space=SPACE, generator=generator)
        assert torch.equal(stages.selected, out.selected)
        assert torch.equal(stages.images["perturbed"], out.aux_images)
        assert torch.equal(stages.images["clean"], batch)
        assert len(stages.images["selected"]) == len(out.selected)
        for key, value in buffers.items():
            twin.get_buffer(key).copy_(value)
        # What was selected from gives the logits that the step saw.
        again = copy.deepcopy(twin)(stages.candidates)
        torch.testing.assert_close(again, out.logits)


def test_the_stages_of_a_lagged_step_are_those_of_two_passes():
    plain, lagged = (
        Observer(make(), EntProp(fraction=0.5, **options), SPACE, seed=0).stages(images(12), torch.arange(12) % CLASSES)
        for options in ({}, {"lagged": True, "equal_budget": True})
    )
    assert torch.equal(plain.selected, lagged.selected)
    assert all(torch.equal(value, lagged.images[name]) for name, value in plain.images.items())


def test_mixed_images_of_the_auxiliary_are_mixtures_of_the_selected():
    observer = Observer(make(), EntProp(fraction=0.5, mix_on="auxiliary"), SPACE, seed=0)
    stages = observer.stages(images(12), torch.arange(12) % CLASSES)
    assert list(stages.images) == ["clean", "selected", "mixed", "perturbed"]
    assert torch.equal(stages.images["selected"], images(12)[stages.selected])
    generator = torch.Generator().manual_seed(0)
    mix = MixUp().draw(stages.images["selected"].shape, generator)
    torch.testing.assert_close(stages.images["mixed"], mix.apply(stages.images["selected"]))
    moved = (stages.images["perturbed"] - stages.images["mixed"]).abs() / SPACE.scale(images(1))
    assert 0 < moved.max() <= 1 / 255 + 1e-12


@pytest.mark.parametrize("net", ["bn", "ln"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_entropies_are_the_model_s_own_and_nothing_changes(net, wrapped):
    model, data = make(net, wrapped=wrapped), loader(20, 8)
    with untouched(model):
        found = entropy_stages(model, data, seed=1, **OPTIONS)
    assert list(found.stages) == ["clean", "mixed", "selected", "perturbed"]
    expected = [reference.entropy(row) for row in model(images(20)).tolist()]
    assert found.values["clean"] == pytest.approx(expected, rel=1e-9)
    assert found.stages["clean"].value == pytest.approx(sum(expected) / 20)
    assert found.changes["mixed"].value == pytest.approx(found.stages["mixed"].value - found.stages["clean"].value)
    assert [len(found.values[stage]) for stage in found.stages] == [20, 20, 6, 6]
    assert (found.batches, found.classes) == (3, CLASSES)
    assert found == entropy_stages(model, data, seed=1, **OPTIONS)
    assert found != entropy_stages(model, data, seed=2, **OPTIONS)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.to_markdown().count("\n") == 7 + 2 * len(found.notes)


def test_a_stage_that_does_nothing_is_left_out():
    stages = entropy_stages(make(), loader(), method=EntProp(mix=None, attack_steps=0), **OPTIONS).stages
    assert list(stages) == ["clean", "selected"]


def test_a_stage_that_lowers_entropy_is_warned_of():
    def certain(logits, labels):
        return logits.softmax(-1).amax(-1)

    with pytest.warns(UserWarning, match="'selected' does not raise entropy beyond chance: it changes by -"):
        entropy_stages(make(), loader(), method=EntProp(uncertainty=certain), **OPTIONS)
    with pytest.warns(UserWarning, match="'selected' does not raise"):
        entropy_stages(make(), loader(), method=EntProp(uncertainty=random_score), **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entropy_stages(make(), loader(96), method=EntProp(mix=None, attack_steps=0), **OPTIONS)


def test_an_attack_may_pass_the_highest_entropy_but_not_take_back_the_selection():
    method = EntProp(mix=None, fraction=0.5, epsilon=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = entropy_stages(make(), loader(96), method=method, **OPTIONS)
    assert short.stages["clean"].value < short.stages["perturbed"].value < short.stages["selected"].value
    assert "past the point of highest entropy" in short.to_markdown()
    with pytest.warns(UserWarning, match=r"no less certain \(0.959 .* selected from \(0.98.*Lower epsilon"):
        entropy_stages(make(), loader(96), method=EntProp(mix=None, fraction=0.5, epsilon=0.1), **OPTIONS)


def test_numbers_of_images():
    assert len(entropy_stages(make(), loader(17, 8), **OPTIONS).values["clean"]) == 16  # no batch of one
    one = entropy_stages(make(), loader(8, 8), **OPTIONS)
    assert one.stages["clean"].low is None


def test_a_frozen_model_is_measured_as_one_that_trains():
    model = make(wrapped=False)
    expected = entropy_stages(model, loader(12), pixel_space=SPACE, progress=False)
    assert entropy_stages(model.requires_grad_(False), loader(12), pixel_space=SPACE, progress=False) == expected


def test_half_precision_models_are_measured():
    model = make(dtype=torch.float32).bfloat16()
    assert entropy_stages(model, loader(dtype=torch.float32), **OPTIONS).batches == 3


def test_intervals_against_their_definition():
    values = [torch.tensor([1.0, 3.0]), torch.tensor([2.0]), torch.tensor([6.0, 0.0, 3.0])]
    found = mean_of(values)
    # Equal batches: the textbook interval of a mean.
    equal = mean_of([torch.tensor([value]) for value in (1.0, 3.0, 2.0)])
    assert equal.value == pytest.approx(2)
    assert equal.high - 2 == pytest.approx(4.302653 * 1 / 3**0.5)
    deviations = [4 - 2 * 2.5, 2 - 2.5, 9 - 3 * 2.5]
    spread = (sum(d * d for d in deviations) * 3 / 2) ** 0.5 / 6
    assert found.value == pytest.approx(2.5)
    assert found.high - found.value == pytest.approx(4.302653 * spread)
    shifted = mean_difference([v + 2 for v in values], values)
    assert (shifted.low, shifted.value, shifted.high) == pytest.approx((2, 2, 2))


def test_resamples_that_say_nothing_are_left_out():
    (found,) = bootstrap(lambda chosen: [1.0 if 0 in chosen else float("nan")], 3, torch.Generator().manual_seed(0))
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    (nothing,) = bootstrap(lambda chosen: [float("nan")], 3, torch.Generator())
    assert (nothing.low, nothing.high) == (None, None)


def test_bootstrap_of_a_mean_agrees_with_its_normal_interval():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    (found,) = bootstrap(lambda rows: [float(values[list(rows)].mean())], 200, torch.Generator().manual_seed(1), 1000)
    half = 1.96 * float(values.std()) / 200**0.5
    assert found.value == pytest.approx(float(values.mean()))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


BAD = {
    "training": (lambda m: m.train(), {}, ConfigurationError, "training mode"),
    "part in training": (lambda m: m.bn1.train(), {}, ConfigurationError, "bn1"),
    "method": (None, {"method": Vanilla()}, ConfigurationError, "selects no images"),
    "no method": (None, {"method": EntProp}, TypeError, "instance"),
    "other auxiliary": (None, {"method": EntProp(auxiliary="adv")}, AuxiliaryNameError, "adv"),
    "seed": (None, {"seed": 0.5}, ConfigurationError, "seed"),
    "space": (None, {"pixel_space": None}, ValueError, "looks normalised"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    change, options, error, match = BAD[case]
    model = make()
    if change:
        change(model)
    with pytest.raises(error, match=match):
        entropy_stages(model, loader(), **{**OPTIONS, **options})


def test_bad_data_is_refused():
    batch = images(4)
    for data, error in (
        ([], DataError),
        (batch, DataError),
        ([batch], DataError),
        ([(batch, torch.full((4,), 99))], LabelError),
        (DataLoader(TensorDataset(batch[:1], torch.zeros(1).long())), DataError),
    ):
        with pytest.raises(error):
            entropy_stages(make(), data, **OPTIONS)
    with pytest.raises(UnsupportedModelError), entprop.auxiliary(model := make()):
        entropy_stages(model, loader(), **OPTIONS)
    with pytest.raises(UnsupportedModelError):
        entropy_stages("resnet50", loader(), **OPTIONS)
