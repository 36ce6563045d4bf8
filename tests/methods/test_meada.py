"""ME-ADA in a step against a naive float64 reference in which every image climbs alone."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError, ModelOutputError, UnsupportedModelError
from entprop_wrap.methods import MEADA, EntropyAscent
from tests.methods.covering import covering, name_of
from tests.methods.loops import Checkpointed, wrapped
from tests.methods.parity import SPACES, Pair, assert_matches, batch_in, run
from tests.reference import meada as reference
from tests.reference.models import HEADS, MODELS, build, random_batch

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

TABLE = {
    "kind": tuple(MODELS),
    "eta": (0.0, 10.0),
    "gamma": (0.0, 1.0, 30.0),
    "steps": (1, 3),
    "fraction": (1.0, 0.4),
    "weight": (1.0, 0.3),
    "soft": (False, True),
    "space": tuple(SPACES),
}


def head(kind):
    return HEADS[kind].removesuffix(".weight")


@pytest.mark.parametrize("case", covering(TABLE), ids=name_of)
def test_meada(case):
    pair, space = Pair(case["kind"]), SPACES[case["space"]]
    images, labels = batch_in(space, soft=case["soft"])
    ascent = {**{name: case[name] for name in ("eta", "gamma", "steps")}, "step_size": 0.2}
    rest = {name: case[name] for name in ("fraction", "weight")}

    out = run(pair, (images, labels), MEADA(EntropyAscent(**ascent), **rest), space)

    expected = reference.step(
        pair.plain, pair.main, pair.auxiliary, images, labels, head=head(case["kind"]), **ascent, **rest, **space
    )
    assert_matches(pair, out, expected)
    moved = (out.aux_images - images[: len(out.aux_images)]).abs()
    assert moved.amax(dim=(1, 2, 3)).min() > 1e-3  # every image has gone somewhere


def test_defaults_are_the_published_ones_for_cifar():
    pair = Pair("batch_norm")
    images, labels = random_batch(7)
    out = run(pair, (images, labels), MEADA())
    expected = reference.step(pair.plain, pair.main, pair.auxiliary, images, labels, head="fc")
    assert_matches(pair, out, expected)
    # 20 of a batch mean over 128, on images with a std of one half
    assert EntropyAscent().step_size == 20 / 128 / 4


def ascend(model, images, labels, **options):
    return EntropyAscent(steps=3, step_size=0.2, **options).run(
        model, model, images, labels, loss=cross_entropy, space=entprop.PixelSpace()
    )


def test_an_image_climbs_alone_whatever_its_batch_and_its_normalisation():
    model = build("batch_norm")
    images, labels = random_batch(7)
    together = ascend(model, images, labels)
    alone = torch.cat([ascend(model, images[i : i + 1], labels[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)

    class Normalised(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x * 0.5 + 0.5)

    shifted = EntropyAscent(steps=3, step_size=0.2).run(
        outer := Normalised(model),
        outer,
        (images - 0.5) / 0.5,
        labels,
        loss=cross_entropy,
        space=entprop.PixelSpace(0.5, 0.5),
    )
    torch.testing.assert_close(shifted * 0.5 + 0.5, together, rtol=0, atol=1e-12)


def test_everything_is_restored_after_an_error():
    model = build("batch_norm")
    images, labels = random_batch(7)
    with pytest.raises(ConfigurationError, match="no layer 'fcc'"):
        ascend(model, images, labels, layer="fcc")
    with pytest.raises(RuntimeError, match="no"):
        EntropyAscent().run(model, _refuse, images, labels, loss=cross_entropy, space=entprop.PixelSpace())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def _refuse(images):
    raise RuntimeError("no")


def test_another_layer_may_hold_the_features():
    model = build("batch_norm")
    images, labels = random_batch(4)
    far, near = (ascend(model, images, labels, layer=layer, gamma=100.0) for layer in (None, "conv2"))
    assert not torch.equal(far, near)


def test_without_a_classifiers_head():
    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            means = self.norm(x).mean((2, 3))
            return torch.cat([means, means.sin()], dim=1)

    with pytest.raises(ModelOutputError, match="layer="):
        entprop.training_step(entprop.wrap(Headless().double()), *_three_classes(), method=MEADA())
    out = entprop.training_step(
        entprop.wrap(Headless().double()), *_three_classes(), method=MEADA(EntropyAscent(gamma=0.0))
    )
    assert out.passes == 17


def _three_classes():
    images, labels = random_batch(8)
    return images, labels % 3


def test_checkpointing():
    batch = random_batch(8)
    method = MEADA(EntropyAscent(steps=2))
    plain = wrapped("layer_norm")  # recomputing would record the statistics of a batch norm twice
    entprop.training_step(plain, *batch, method=method)
    model = entprop.wrap(Checkpointed(entprop.unwrap(wrapped("layer_norm")), False))
    with torch.no_grad():  # the copies of the plain one
        for (_, mine), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            mine.copy_(theirs)
    entprop.training_step(model, *batch, method=method)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)

    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        entprop.training_step(
            entprop.wrap(Checkpointed(build("batch_norm"), True)),
            batch[0],
            batch[1],
            method=MEADA(EntropyAscent(gamma=0.0)),
        )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EntropyAscent, {"eta": -1.0}),
        (EntropyAscent, {"eta": float("nan")}),
        (EntropyAscent, {"gamma": -1}),
        (EntropyAscent, {"steps": 0}),
        (EntropyAscent, {"step_size": 0}),
        (EntropyAscent, {"layer": 3}),
        (MEADA, {"fraction": 0.0}),
        (MEADA, {"fraction": 1.1}),
        (MEADA, {"weight": 0}),
        (MEADA, {"ascent": EntropyAscent}),
    ],
)
def test_options_out_of_range_are_refused(kind, options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        kind(**options)
