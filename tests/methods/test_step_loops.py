"""``training_step`` in loops of torch and Accelerate: accumulation, clipping, AMP, and what it refuses."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

import entprop_wrap as entprop
from entprop_wrap import errors
from entprop_wrap.functional import CutMix
from entprop_wrap.methods import Vanilla
from tests.methods.loops import (
    assert_close,
    distance,
    distance_under_autocast,
    entprop_method,
    gradients,
    plain_gradients,
    wrapped,
)
from tests.reference.models import CLASSES, build, random_batch

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

BATCH, SELECTED = 7, 3


@pytest.fixture
def accelerator():
    """A factory, so that no test inherits another's process-wide state."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()

    reset()
    yield lambda **options: Accelerator(cpu=True, **options)
    reset()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("batch_norm", {"mix": entprop.MixUp(alpha=1.0)}),
        ("layer_norm", {"mix": CutMix(alpha=1.0), "mix_on": "auxiliary", "attack_steps": 3}),
        ("mixed_norms", {"attack_steps": 3}),
    ],
)
def test_a_plain_and_an_accelerate_loop_agree(kind, options, accelerator):
    models, outs = [wrapped(kind), wrapped(kind)], []
    for model, accelerate in zip(models, (None, accelerator()), strict=True):
        out = entprop.training_step(
            accelerate.prepare(model) if accelerate else model,
            *random_batch(BATCH),
            method=entprop_method(**options),
            backward=accelerate.backward if accelerate else None,
            generator=torch.Generator().manual_seed(0),
        )
        outs.append(out)
    assert torch.equal(outs[0].loss, outs[1].loss)
    assert_close(gradients(models[1]), gradients(models[0]), 0.0)
    for first, second in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("kind", "steps"), [("batch_norm", 3), ("layer_norm", 1)])
def test_accumulated_gradients_are_the_mean_of_the_steps(kind, steps, accelerator):
    accelerate = accelerator(gradient_accumulation_steps=3)
    model = wrapped(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerate.prepare(model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = [random_batch(BATCH, seed=seed) for seed in range(3)]
    for index, batch in enumerate(batches):
        with accelerate.accumulate(model):
            out = entprop.training_step(
                model, *batch, method=entprop_method(attack_steps=steps), backward=accelerate.backward
            )
            assert accelerate.sync_gradients == (index == 2)
            assert out.loss.item() == pytest.approx(
                out.main_loss.item() + SELECTED / BATCH * out.aux_loss.item(), rel=1e-12
            )
            if accelerate.sync_gradients:
                found = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
    singles = [plain_gradients(batch, kind=kind, attack_steps=steps) for batch in batches]
    mean = {name: sum(single[name] for single in singles) / 3 for name in found}
    assert_close(found, mean, 1e-12)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name] - 0.1 * mean[name], rtol=0, atol=1e-12)


def test_clipping_sees_both_branches(accelerator):
    batch = random_batch(BATCH)
    accelerate = accelerator()
    model = accelerate.prepare(wrapped())
    entprop.training_step(model, *batch, method=entprop_method(), backward=accelerate.backward)
    norm = accelerate.clip_grad_norm_(model.parameters(), 0.05)
    expected = plain_gradients(batch)
    total = math.sqrt(sum(gradient.square().sum() for gradient in expected.values()))
    assert total > 0.05
    assert norm.item() == pytest.approx(total, rel=1e-12)
    assert_close(gradients(model), {name: g * (0.05 / (total + 1e-6)) for name, g in expected.items()}, 1e-12)


def test_bfloat16_of_accelerate_is_close_to_float32(accelerator):
    batch = random_batch(BATCH, dtype=torch.float32)
    expected = plain_gradients(batch, kind="layer_norm", dtype=torch.float32, attack_steps=2)
    model, accelerate = wrapped("layer_norm", torch.float32), accelerator(mixed_precision="bf16")
    call = accelerate.prepare(model)
    out = entprop.training_step(call, *batch, method=entprop_method(attack_steps=2), backward=accelerate.backward)
    assert out.entropy.dtype == out.aux_images.dtype == torch.float32
    assert 0 < distance(gradients(model), expected) < 2 * distance_under_autocast("layer_norm", torch.bfloat16, BATCH)


def test_a_scaler_skips_a_step_that_overflows_in_the_auxiliary_branch():
    """One optimizer step sees both branches, so an overflow in either makes the scaler drop the whole step."""
    model = wrapped(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    calls = []

    def backward(loss):
        calls.append(loss)
        scaler.scale(loss * (float("inf") if len(calls) == 2 else 1.0)).backward()

    before = [p.detach().clone() for p in model.parameters()]
    entprop.training_step(model, *random_batch(BATCH, dtype=torch.float32), method=entprop_method(), backward=backward)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# Refusals -------------------------------------------------------------------------------------------------------------


class Returning(nn.Module):
    """A wrapped-to-be net whose output goes through ``change``."""

    def __init__(self, change):
        super().__init__()
        self.net = build("batch_norm")
        self.change = change

    def forward(self, pixels):
        return self.change(self.net(pixels))


def images_like(change):
    return lambda: (change(random_batch(BATCH)[0]), random_batch(BATCH)[1])


def labels_like(change):
    return lambda: (random_batch(BATCH)[0], change(random_batch(BATCH)[1]))


def with_value(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def one_hot(labels):
    return F.one_hot(labels, CLASSES).double()


BAD_BATCHES = {
    # name: (batch, error, what its message has to say)
    "uint8": (images_like(lambda x: (255 * x).to(torch.uint8)), errors.ImageError, "uint8"),
    "integers": (images_like(lambda x: (255 * x).to(torch.int64)), errors.ImageError, "int64"),
    "0 to 255": (images_like(lambda x: 255 * x), errors.PixelRangeError, "255"),
    "NHWC": (images_like(lambda x: x.permute(0, 2, 3, 1)), errors.ImageError, r"\(7, 8, 8, 3\)|permute|NHWC"),
    "one image": (images_like(lambda x: x[0]), errors.ImageError, r"\(3, 8, 8\)"),
    "a list": (images_like(list), errors.ImageError, "list"),
    "no images": (lambda: (torch.zeros(0, 3, 8, 8).double(), torch.zeros(0).long()), errors.ImageError, None),
    "NaN": (images_like(with_value((4, 2, 1, 1), math.nan)), errors.ImageError, "NaN|nan|finite"),
    "infinite": (images_like(with_value((4, 2, 1, 1), math.inf)), errors.ImageError, "inf|finite"),
    "normalised": (images_like(lambda x: (x - 0.45) / 0.22), errors.PixelRangeError, "normalised.*pixel_space"),
    "batch of one": (lambda: random_batch(1), errors.ImageError, "2|two|one"),
    "labels too large": (labels_like(with_value(3, CLASSES)), errors.LabelError, "5"),
    "labels negative": (labels_like(with_value(3, -1)), errors.LabelError, "-1"),
    "labels float": (labels_like(lambda y: y.double()), errors.LabelError, "labels are probabilities"),
    "labels bool": (labels_like(lambda y: y > 1), errors.LabelError, "bool"),
    "labels (N, 1)": (labels_like(lambda y: y[:, None]), errors.LabelError, r"\(7, 1\)"),
    "labels too few": (labels_like(lambda y: y[:5]), errors.LabelError, "5.*7|7.*5"),
    "labels a list": (labels_like(lambda y: y.tolist()), errors.LabelError, "list"),
    "labels one number": (labels_like(lambda y: y[0]), errors.LabelError, None),
    "one-hot integers": (labels_like(lambda y: F.one_hot(y, CLASSES)), errors.LabelError, "float"),
    "soft labels, too few classes": (labels_like(lambda y: torch.ones(BATCH, 4).double() / 4), errors.LabelError, "4"),
    "soft labels, too few": (labels_like(lambda y: one_hot(y)[:5]), errors.LabelError, "5.*7|7.*5"),
    "soft labels, NaN": (labels_like(lambda y: with_value((1, 1), math.nan)(one_hot(y))), errors.LabelError, None),
    "soft labels, negative": (labels_like(lambda y: 2.0 * one_hot(y) - 0.25), errors.LabelError, None),
}

BAD_MODELS = {
    "not wrapped": (lambda: build("batch_norm"), errors.NotWrappedError, "wrap"),
    "in eval mode": (lambda: wrapped().eval(), errors.EntPropError, r"train\(\)|eval"),
    "features": (lambda: entprop.wrap(Returning(lambda z: z.mean(1)).train()), errors.ModelOutputError, r"\(7,\)"),
    "a map": (lambda: entprop.wrap(Returning(lambda z: z[..., None]).train()), errors.ModelOutputError, "5, 1"),
    "nothing": (lambda: entprop.wrap(Returning(lambda z: None).train()), errors.ModelOutputError, "None"),
    "no logits": (
        lambda: entprop.wrap(Returning(lambda z: {"last_hidden_state": z}).train()),
        errors.ModelOutputError,
        "last_hidden_state",
    ),
    "other rows": (lambda: entprop.wrap(Returning(lambda z: z[:3]).train()), errors.ModelOutputError, r"\(3, 5\)"),
}


@contextlib.contextmanager
def untouched(model):
    """Whatever happens inside, the model keeps its parameters, buffers, modes and (no) gradients."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    yield
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not moved, f"moved: {moved}"
    assert not gradients(model)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches_are_refused(name):
    batch, error, message = BAD_BATCHES[name]
    model = wrapped()
    for method in (entprop_method(), Vanilla()):
        with untouched(model), pytest.raises(error, match=message):
            entprop.training_step(model, *batch(), method=method)


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_refused(name):
    make, error, message = BAD_MODELS[name]
    model = make()
    with untouched(model), pytest.raises(error, match=message):
        entprop.training_step(model, *random_batch(BATCH), method=entprop_method())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_narrow_integer_labels_are_taken(dtype):
    images, labels = random_batch(BATCH)
    model = wrapped()
    entprop.training_step(model, images, labels.to(dtype), method=entprop_method())
    assert_close(gradients(model), plain_gradients((images, labels)), 0.0)


def test_a_refused_batch_leaves_the_next_step_as_it_was():
    batch = random_batch(BATCH)
    model = wrapped()
    for name in ("uint8", "labels too large", "normalised"):
        with pytest.raises(errors.EntPropError):
            entprop.training_step(model, *BAD_BATCHES[name][0](), method=entprop_method())
    entprop.training_step(model, *batch, method=entprop_method())
    assert_close(gradients(model), plain_gradients(batch), 0.0)


@pytest.mark.parametrize("context", ["no_grad", "inference_mode"])
def test_a_step_without_gradients_is_refused(context):
    model = wrapped()
    with untouched(model), getattr(torch, context)(), pytest.raises(errors.ConfigurationError, match=context):
        entprop.training_step(model, *random_batch(BATCH), method=entprop_method())


BAD_OPTIONS = {
    "step_size in pixels": ({"step_size": 1}, "1/255"),
    "step_size negative": ({"step_size": -1 / 255}, "step_size"),
    "fraction zero": ({"fraction": 0}, "fraction"),
    "fraction negative": ({"fraction": -0.2}, "fraction"),
    "fraction in percent": ({"fraction": 20}, "fraction"),
    "fraction NaN": ({"fraction": math.nan}, "fraction"),
    "attack_steps negative": ({"attack_steps": -1}, "attack_steps"),
    "attack_steps fractional": ({"attack_steps": 1.5}, "attack_steps"),
    "mix_on": ({"mix_on": "selected", "mix": entprop.MixUp()}, "batch.*auxiliary"),
    "weighting": ({"weighting": "mean"}, "per_image.*sum"),
    "mix a number": ({"mix": 0.2}, "MixUp"),
    "mix a class": ({"mix": entprop.MixUp}, "MixUp"),
    "uncertainty of another name": ({"uncertainty": "entrop"}, "entropy"),
    "uncertainty a number": ({"uncertainty": 1}, "function"),
    "mix of another name": ({"mix": "mixdown"}, "mixup.*mixdown"),
    "alpha without a mixer": ({"mix": None, "alpha": 0.2}, "MixUp and CutMix"),
    "alpha negative": ({"alpha": -1.0}, "alpha must be"),
    "alpha zero": ({"mix": "cutmix", "alpha": 0}, "alpha must be"),
    "alpha infinite": ({"alpha": math.inf}, "alpha must be"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_refused_where_they_are_written(name):
    options, message = BAD_OPTIONS[name]
    with pytest.raises(errors.EntPropError, match=message):
        entprop.EntProp(**options)


@pytest.mark.parametrize(
    ("space", "message"),
    [(entprop.PixelSpace((0.5,) * 4, 0.5), "channel"), (entprop.PixelSpace(0.3, 0.22), "spans")],
)
def test_another_pixel_space_is_refused(space, message):
    images, labels = random_batch(BATCH)
    model = wrapped()
    with untouched(model), pytest.raises(errors.ImageError, match=message):
        entprop.training_step(model, 6 * images - 3, labels, method=entprop_method(), pixel_space=space)


def test_a_bigger_head_is_known_after_its_first_pass():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    images = torch.rand(4, 3, 2, 2)
    entprop.training_step(model, images, torch.arange(4), method=Vanilla())
    model[1] = torch.nn.Linear(12, 9)
    out = entprop.training_step(model, images, torch.arange(4) + 5, method=Vanilla())
    assert out.logits.shape == (4, 9)
    with pytest.raises(errors.LabelError):
        entprop.training_step(model, images, torch.arange(4) + 6, method=Vanilla())
