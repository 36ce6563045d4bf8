"""Fine-grained AdvProp against its naive float64 reference, its augmentations, and what it refuses."""

import copy
import pickle

import pytest
import torch

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError, ImageError
from entprop_wrap.functional.attacks import PGD, uniform_start
from entprop_wrap.methods import FineGrainedAdvProp
from entprop_wrap.methods.advprop import wrong_labels
from entprop_wrap.robustness import PGD as MeasuringPGD
from tests.methods.covering import covering, name_of
from tests.methods.loops import wrapped
from tests.methods.parity import (
    BATCH,
    IMAGENET,
    PIXELS,
    SPACES,
    Pair,
    Rows,
    batch_in,
    plain_name,
    seeded,
)
from tests.reference import fine_grained_advprop as reference
from tests.reference.models import CLASSES, MODELS, random_batch

WEAK = {"epsilon": 1.5 / 255, "steps": 1, "step_size": 1.5 / 255}
STRONG = {"epsilon": 4 / 255, "steps": 3, "step_size": 1.5 / 255}


def negative(pixels):
    return 1 - pixels


def state_of(model, plain):
    """(main entries, entries by auxiliary), all under the names of the plain model ``plain``."""
    entries = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    main = {name: entries[name].detach().clone() for name in plain}
    auxiliaries = {}
    for name, value in entries.items():
        if name not in plain:
            auxiliary = next(part for part in name.split(".") if part.startswith("entprop_")).removeprefix("entprop_")
            auxiliaries.setdefault(auxiliary, {})[plain_name(name, plain)] = value
    return main, auxiliaries


def copied(tensors):
    return {name: {key: value.detach().clone() for key, value in own.items()} for name, own in tensors.items()}


def start_of(images, epsilon, space, generator):
    return uniform_start(images, epsilon, entprop.PixelSpace(**space), generator)


TABLE = {
    "kind": tuple(MODELS),
    "targeted": (False, True),
    "attack_statistics": ("running", "batch"),
    "weight": (1.0, 0.3, "each"),
    "soft": (False, True),
    "space": tuple(SPACES),
    "order": ("weak-strong-negative", "negative-strong", "strong-weak"),
}


@pytest.mark.parametrize("case", covering(TABLE, lambda row: not (row["soft"] and row["targeted"])), ids=name_of)
def test_a_step_equals_the_reference(case):
    names, space = case["order"].split("-"), SPACES[case["space"]]
    images, labels = batch_in(space, soft=case["soft"])
    each = {name: 0.4 + 0.3 * index for index, name in enumerate(names)}
    known = {"weak": PGD(**WEAK, random_start=False), "strong": PGD(**STRONG), "negative": negative}
    plain = Pair(case["kind"]).plain
    model = wrapped(case["kind"], auxiliaries=tuple(names))
    main, auxiliaries = state_of(model, set(plain.state_dict()))
    before = copied(auxiliaries)

    method = FineGrainedAdvProp(
        {name: known[name] for name in names},
        weight=each if case["weight"] == "each" else case["weight"],
        targeted=case["targeted"],
        attack_statistics=case["attack_statistics"],
    )
    assert method.auxiliaries == tuple(names)
    out = entprop.training_step(
        model, images, labels, method=method, pixel_space=entprop.PixelSpace(**space), generator=seeded()
    )

    draws, branches = seeded(), {}
    mean, std = (images.new_tensor(space[name]).view(3, 1, 1) for name in ("mean", "std"))
    for name in names:
        weight = each[name] if case["weight"] == "each" else case["weight"]
        if name == "negative":
            torch.randint(2**62, (), generator=draws)  # what augmentations draw follows the step's generator
            branches[name] = reference.Branch((1 - (images * std + mean) - mean) / std, weight=weight)
            continue
        wrong = wrong_labels(labels, CLASSES, draws) if case["targeted"] else None
        start = start_of(images, STRONG["epsilon"], space, draws) if name == "strong" else images
        branches[name] = reference.Branch(start, wrong=wrong, weight=weight, **{"weak": WEAK, "strong": STRONG}[name])
    expected = reference.step(
        plain, main, before, images, labels, branches, attack_statistics=case["attack_statistics"], **space
    )

    rows = Rows()
    for name in ("loss", "main_loss", "logits", "passes"):
        rows.add(name, getattr(out, name), getattr(expected, name))
    weights = {name: branch.weight for name, branch in branches.items()}
    rows.add("aux_loss", out.aux_loss, sum(weights[n] * expected.losses[n] for n in names) / sum(weights.values()))
    rows.add("aux_logits", out.aux_logits, torch.cat([expected.aux_logits[name] for name in names]))
    rows.add("aux_images", out.aux_images, torch.cat([expected.aux_images[name] for name in names]))
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    for name, value in {**expected.main_gradients, **expected.main_buffers}.items():
        rows.add(f"main {name}", gradients[name] if name in gradients else model.get_buffer(name), value)
    for auxiliary, own in auxiliaries.items():
        assert set(own) == {*expected.auxiliary_gradients[auxiliary], *expected.auxiliary_buffers[auxiliary]}
        for name, tensor in own.items():
            if name in expected.auxiliary_gradients[auxiliary]:
                rows.add(f"{auxiliary} {name}", tensor.grad, expected.auxiliary_gradients[auxiliary][name])
            else:
                rows.add(f"{auxiliary} {name}", tensor, expected.auxiliary_buffers[auxiliary][name])
    rows.check()


# Augmentations --------------------------------------------------------------------------------------------------------


def step(method, batch=None, space=PIXELS, generator=None):
    return entprop.training_step(
        wrapped("layer_norm", auxiliaries=method.auxiliaries),
        *(batch or random_batch(BATCH)),
        method=method,
        pixel_space=entprop.PixelSpace(**space),
        generator=generator,
    )


def test_augmentations_see_pixels_and_what_they_return_is_valid():
    seen = []

    def brighter(pixels):
        seen.append(pixels.clone())
        return pixels.mul_(3).float()  # in place, out of range, and in another precision

    images, labels = batch_in(IMAGENET)
    given = images.clone()
    out = step(FineGrainedAdvProp({"bright": brighter}), (images, labels), IMAGENET)
    assert torch.equal(images, given)
    raw, _ = random_batch(BATCH)
    torch.testing.assert_close(seen[0], raw, rtol=0, atol=1e-12)
    assert seen[0].min() >= 0
    assert seen[0].max() <= 1
    mean, std = (torch.tensor(IMAGENET[name], dtype=torch.float64).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(out.aux_images * std + mean, (3 * raw).clamp(0, 1), rtol=0, atol=1e-6)
    assert out.aux_images.dtype == torch.float64


def noisy(pixels):
    return pixels + 0.1 * torch.randn_like(pixels)


def test_what_augmentations_draw_follows_the_generator_and_leaves_torchs_alone():
    method, found = FineGrainedAdvProp({"noise": noisy}), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(step(method, generator=seeded()).aux_images)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*found)
    assert not torch.equal(found[0], step(method, generator=seeded(6)).aux_images)
    generator = seeded()
    assert not torch.equal(*(step(method, generator=generator).aux_images for _ in range(2)))
    torch.manual_seed(1)
    unseeded = step(method).aux_images
    torch.manual_seed(1)
    assert torch.equal(unseeded, step(method).aux_images)
    assert not torch.equal(unseeded, step(method).aux_images)


def test_torchvision_augments():
    transforms = pytest.importorskip("torchvision.transforms.v2")

    def each(pixels):
        return torch.stack([transforms.TrivialAugmentWide()(image) for image in pixels])

    images, labels = random_batch(BATCH, dtype=torch.float32)
    method = FineGrainedAdvProp({"one": transforms.RandomHorizontalFlip(p=1.0), "each": each})
    model = wrapped("layer_norm", torch.float32, auxiliaries=method.auxiliaries)
    out = entprop.training_step(model, images, labels, method=method, generator=seeded())
    torch.testing.assert_close(out.aux_images[:BATCH], images.flip(3))
    assert out.aux_images[BATCH:].shape == images.shape
    assert out.passes == 3


@pytest.mark.parametrize(
    "broken", [lambda pixels: pixels[:-1], lambda pixels: pixels[..., :4], lambda pixels: None, torch.Tensor.byte]
)
def test_augmentations_that_return_something_else_are_refused(broken):
    with pytest.raises(ImageError, match=r"'odd'.*\(7, 3, 8, 8\)"):
        step(FineGrainedAdvProp({"odd": broken}))


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": {}}, "maps names"),
        ({"branches": [PGD()]}, "maps names"),
        ({"branches": {"adv": PGD}}, r"'adv' must be an attack such as PGD\("),
        ({"branches": {"adv": 4 / 255}}, "'adv' must be"),
        ({"branches": {"adv": PGD()}, "weight": 0}, "above 0"),
        ({"branches": {"adv": PGD()}, "weight": {"adv": -1}}, "above 0"),
        ({"branches": {"adv": PGD()}, "weight": {"aux": 1}}, r"\['aux'\]; expected one for each of \['adv'\]"),
        ({"branches": {"dark": negative}, "targeted": True}, "no effect without an attack"),
        ({"branches": {"adv": PGD()}, "attack_statistics": "none"}, "'running' or 'batch'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        FineGrainedAdvProp(**options)


def test_it_is_a_value():
    branches = {"adv": PGD(), "dark": negative}
    method = FineGrainedAdvProp(branches, weight={"adv": 1.0, "dark": 2.0})
    branches["more"] = PGD()
    assert method.auxiliaries == ("adv", "dark")
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert other == method
        assert hash(other) == hash(method)
    assert method != FineGrainedAdvProp({"adv": PGD(), "dark": negative})


def test_an_attack_that_measures_serves_too():
    out = step(FineGrainedAdvProp({"adv": MeasuringPGD(2 / 255, steps=2)}))
    assert out.passes == 1 + 3
