"""``EntProp(lagged=True)``: one pass for the batch and for what the step before hardened."""

import copy
import warnings

import pytest
import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap import EntProp
from entprop_wrap.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from entprop_wrap.methods.lagged import lagged_state, load_lagged_state
from tests.helpers.architectures import ARCHITECTURES
from tests.methods.loops import gradients
from tests.methods.parity import FixedMixer, Pair, Rows, compare_state
from tests.reference import entprop as two_passes
from tests.reference import lagged as reference
from tests.reference.models import build, random_batch

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

KINDS = ("batch_norm", "layer_norm", "group_norm")
BLEND = two_passes.Blend(0.3, (3, 0, 6, 1, 4, 2, 5))


@pytest.mark.parametrize("equal_budget", [False, True])
@pytest.mark.parametrize("blend", [None, BLEND])
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_match_two_separate_passes(kind, blend, equal_budget):
    pair = Pair(kind)
    mix = None if blend is None else FixedMixer(blend)
    method = EntProp(fraction=0.4, epsilon=0.03, mix=mix, lagged=True, equal_budget=equal_budget)
    waiting = None
    for number in range(3):
        images, labels = random_batch(7, seed=number)
        if waiting is not None and equal_budget and blend is not None:
            mix.blend.__dict__["partner"] = (3, 0, 2, 1)
        expected = reference.step(
            pair.plain, *pair.state(), images, labels, waiting,
            fraction=0.4, epsilon=0.03, blend=None if mix is None else mix.blend, equal_budget=equal_budget,
        )  # fmt: skip
        pair.model.zero_grad()
        out = entprop.training_step(pair.model, images, labels, method=method)
        waiting = expected.waiting
        assert out.selected.tolist() == expected.selected
        rows = Rows()
        rows.add("loss", out.loss, expected.loss)
        rows.add("waiting", lagged_state(pair.model)["images"], waiting.images)
        compare_state(rows, pair, expected)
        rows.check()
    if blend is not None:
        blend.__dict__["partner"] = (3, 0, 6, 1, 4, 2, 5)


def wrapped(kind, seed=0):
    return entprop.wrap(build(kind, seed=seed))


@pytest.mark.parametrize(("options", "passes"), [({}, [1, 1.4, 1.4]), ({"equal_budget": True}, [1, 1, 1])])
def test_one_forward_of_so_many_rows_and_one_backward(options, passes):
    model, rows, backwards = wrapped("batch_norm"), [], []
    model(random_batch(7)[0])  # the trial of the first step is counted apart
    method = EntProp(fraction=0.4, lagged=True, **options)
    entprop.training_step(model, *random_batch(7), method=method)
    entprop.training_step(model, *random_batch(7), method=method)
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))

    def backward(loss):
        backwards.append(loss)
        loss.backward()

    out = entprop.training_step(model, *random_batch(7), method=method, backward=backward)
    assert rows == [7 if options else 10]
    assert len(backwards) == 1
    assert out.passes == pytest.approx(rows[0] / 7) == pytest.approx(passes[2], abs=0.03)


def test_a_scaled_loss_hardens_the_same_images_and_a_step_under_fp16_is_close():
    plain, scaled, half = (wrapped("layer_norm").float() for _ in range(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    method = EntProp(fraction=0.4, epsilon=0.03, mix=None, lagged=True)
    for number in range(2):
        images, labels = random_batch(16, seed=number, dtype=torch.float32)
        for model in (plain, scaled, half):
            model.zero_grad()
        entprop.training_step(plain, images, labels, method=method)
        for model in (scaled, half):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            with torch.autocast("cpu", torch.float16, enabled=model is half):
                entprop.training_step(
                    model, images, labels, method=method, backward=lambda loss: scaler.scale(loss).backward()
                )
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        expected = gradients(plain)
        for name, gradient in gradients(scaled).items():
            torch.testing.assert_close(gradient, expected[name])
        near = [(g - expected[name]).norm() / expected[name].norm() for name, g in gradients(half).items()]
        assert 0 < float(torch.stack(near).median()) < 0.05
    torch.testing.assert_close(lagged_state(scaled)["images"], lagged_state(plain)["images"])
    assert scaler.get_scale() == 2.0**10


class SequenceFirst(nn.Module):
    """Tokens before images, as ``nn.MultiheadAttention`` has them by default."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        tokens = self.patch(images).flatten(2).permute(2, 0, 1)
        return self.head(self.norm(tokens).mean(0))


class WindowMajor(SequenceFirst):
    """The windows of all images one after the other: dimension 0 is a multiple of the batch, in another order."""

    def forward(self, images):
        tokens = self.patch(images).flatten(2).permute(2, 0, 1)
        windows = self.norm(tokens.flatten(0, 1).unsqueeze(1))
        return self.head(windows.view(tokens.shape).mean(0))


class Rolled(SequenceFirst):
    """The batch in another order inside the model."""

    def forward(self, images):
        tokens = self.patch(images).flatten(2).transpose(1, 2).roll(1, 0)
        return self.head(self.norm(tokens).mean(1).roll(-1, 0))


class RolledAtFirst(Rolled):
    """A norm that runs twice, with the batch in another order the first time."""

    def forward(self, images):
        tokens = self.patch(images).flatten(2).transpose(1, 2).roll(1, 0)
        return self.head(self.norm(self.norm(tokens).roll(-1, 0)).mean(1))


@pytest.mark.parametrize("make", [SequenceFirst, WindowMajor, Rolled, RolledAtFirst])
def test_models_that_permute_the_batch_are_refused_by_layer(make):
    model = entprop.wrap(make().double())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=r"norm layer 'norm'.*lagged=False"):
        entprop.training_step(model, *random_batch(8), method=EntProp(lagged=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not gradients(model)
    entprop.training_step(model, *random_batch(8), method=EntProp())


def test_shared_norms_over_the_whole_batch_are_named_as_the_reason():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), norm, nn.Flatten(), nn.Linear(144, 5)).double()
    with pytest.raises(UnsupportedModelError, match=r"no shared norm layer may take statistics.*exclude=.*copies="):
        entprop.training_step(entprop.wrap(plain, exclude="2"), *random_batch(8), method=EntProp(lagged=True))
    entprop.training_step(entprop.wrap(entprop.unwrap(plain)), *random_batch(8), method=EntProp(lagged=True))


#: Rows of windows, tokens, channels last or pixels: where a layout could keep an image's rows apart.
LAYOUTS = (
    "torchvision/swin",
    "timm/maxvit",
    "timm/coatnet",
    "timm/efficientnet",
    "transformers/swin",
    "transformers/cvt",
)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name in LAYOUTS], ids=lambda a: a.name)
def test_architectures(architecture):
    model = entprop.wrap(architecture.build())
    method = EntProp(fraction=0.5, epsilon=0.01, mix=None, lagged=True)
    images = architecture.images(6).sigmoid()
    labels = torch.arange(6) % 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entprop.training_step(model, images, labels, method=method)
        out = entprop.training_step(model, images, labels, method=method)
    assert out.passes == 1.5
    assert out.loss.isfinite()


@pytest.mark.parametrize("mixed", [False, True])
def test_what_waits_is_saved_and_resumed_bit_for_bit(mixed):
    method = EntProp(fraction=0.4, lagged=True, mix=entprop.MixUp() if mixed else None)
    model = wrapped("batch_norm")
    entprop.training_step(model, *random_batch(7), method=method, generator=torch.Generator().manual_seed(0))
    other = wrapped("batch_norm", seed=1)
    other.load_state_dict(model.state_dict())
    load_lagged_state(other, {name: tensor.clone() for name, tensor in lagged_state(model).items()})
    for each in (model, other):
        each.zero_grad()
        generator = torch.Generator().manual_seed(1)
        out = entprop.training_step(each, *random_batch(7, seed=1), method=method, generator=generator)
        assert out.aux_loss is not None
    assert all(torch.equal(value, gradients(other)[name]) for name, value in gradients(model).items())
    with pytest.raises(CheckpointError, match="lagged_state"):
        load_lagged_state(other, {"pixels": torch.zeros(1)})
    load_lagged_state(other, {})
    assert lagged_state(other) == {}


def test_what_no_longer_fits_is_dropped():
    model = wrapped("batch_norm")
    method = EntProp(fraction=0.4, lagged=True, mix=None)
    entprop.training_step(model, *random_batch(7), method=method)
    larger = torch.rand(7, 3, 12, 12, dtype=torch.float64)
    assert entprop.training_step(model, larger, random_batch(7)[1], method=method).aux_loss is None
    assert entprop.training_step(model, larger, random_batch(7)[1], method=method).aux_loss is not None


def test_what_waits_for_another_training_is_dropped():
    method, (images, labels) = EntProp(fraction=0.4, lagged=True, mix=None), random_batch(7)
    model = wrapped("batch_norm")
    entprop.training_step(model, images, labels, method=method)
    entprop.wrap(entprop.unwrap(model))
    assert entprop.training_step(model, images, labels, method=method).aux_loss is None
    space = entprop.PixelSpace(0.5, 0.5)
    assert entprop.training_step(model, 2 * images - 1, labels, method=method, pixel_space=space).aux_loss is None
    assert entprop.training_step(model, 2 * images - 1, labels, method=method, pixel_space=space).aux_loss is not None


def test_options_that_contradict_each_other():
    with pytest.raises(ConfigurationError, match="lagged=True"):
        EntProp(equal_budget=True)
    with pytest.raises(ConfigurationError, match=r"at most 0\.5, found 0\.7"):
        EntProp(fraction=0.7, lagged=True, equal_budget=True)


@pytest.mark.parametrize("last", [2, 3, 5])
def test_a_last_batch_that_what_came_back_would_fill_is_trained_whole(last):
    model, method = wrapped("batch_norm"), EntProp(fraction=0.4, lagged=True, equal_budget=True, mix=None)
    found = []
    for number in (10, last, 10):
        model.zero_grad()
        found.append(entprop.training_step(model, *random_batch(number), method=method))
    assert [len(out.logits) for out in found] == [10, last, 8]
    assert found[1].passes == (last + 4) / last
    assert float(found[1].loss) == pytest.approx(float(found[1].main_loss + 4 / last * found[1].aux_loss))
