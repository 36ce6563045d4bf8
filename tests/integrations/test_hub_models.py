"""Every image classifier of transformers: wrapped, stepped, trained by the Trainer, and given back as it was."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.func import functional_call
from torch.utils.data import SequentialSampler

import entprop_wrap as entprop
from entprop_wrap.errors import EntPropError, UnsupportedModelError
from entprop_wrap.integrations.hf_trainer import EntPropCallback
from tests.helpers.hub_models import BROKEN, CLASSES, EXCEPTIONS, GONE, KINDS, NEEDS, REFUSED, build_tiny, image_size
from tests.helpers.keys import is_auxiliary_key, original_name
from tests.helpers.oracle import auxiliary_tensors, perturb
from tests.integrations.hf_trainer_reference import OLD, RecordGradients, averaged, make_trainer, worst

NAMES = sorted(set(KINDS) - set(NEEDS) - set(REFUSED) - BROKEN)
#: Their forward takes no labels, or ignores them: in the Trainer they need ``compute_loss_func``.
NO_LOSS = {
    "DeiTForImageClassificationWithTeacher",
    "EfficientFormerForImageClassificationWithTeacher",
    "LevitForImageClassificationWithTeacher",
}
METHOD = entprop.EntProp(fraction=0.5, mix=None)
BATCH = 6


def batch(name):
    size = image_size(name)
    images = torch.rand(BATCH, 3, size, size, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(BATCH) % CLASSES


def run_on(model, tensors, images, labels):
    """Gradients of the mean loss of the unwrapped model run on clones and ``tensors``, and the buffers that leaves."""
    own = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    run = {**own, **buffers, **tensors}
    F.cross_entropy(functional_call(model, run, (images,)).logits, labels).backward()
    return {name: run[name].grad for name in own}, {name: run[name] for name in buffers}


def expected_step(plain, wrapped_copies, out, images, labels):
    """What a step leaves: gradients of shared weights, of main norms and of copies, without the switch."""
    first, buffers = run_on(plain, {}, images, labels)
    second, _ = run_on(plain, wrapped_copies, out.aux_images, labels[out.selected])
    weight = len(out.selected) / len(labels)
    shared, copies = {}, {}
    for name, gradient in first.items():
        other = None if second[name] is None else weight * second[name]
        if name in wrapped_copies:
            shared[name], copies[name] = gradient, other
        else:
            shared[name] = other if gradient is None else gradient if other is None else gradient + other
    return shared, copies, buffers, {n: t for n, t in wrapped_copies.items() if not t.requires_grad}


def assert_close(found, expected, what):
    assert set(found) == set(expected), what
    size = max([float(v.abs().max()) for v in expected.values() if v is not None and v.numel()], default=0.0)
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), f"{what} {name}"
        if value is not None:
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5 * max(size, 1e-3), msg=f"{what} {name}")


def trainer_of(name, folder, model, **options):
    images, labels = batch(name)
    recorded = RecordGradients()
    trainer = make_trainer(
        folder,
        model=model,
        data=[{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)],
        callbacks=[EntPropCallback(METHOD, pixel_space=entprop.PixelSpace()), recorded],
        compute_loss_func=averaged if name in NO_LOSS else None,
        max_steps=1,
        per_device_train_batch_size=BATCH,
        **options,
    )
    trainer._get_train_sampler = lambda *args: SequentialSampler(images)
    return trainer, recorded


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_two_models_that_share_weights_in_the_trainer_too(name, tmp_path):
    plain, model = build_tiny(name), build_tiny(name)
    keys = list(plain.state_dict())
    entprop.wrap(model)
    perturb(model)  # equal copies would hide every error
    in_trainer = copy.deepcopy(model)
    copies = auxiliary_tensors(model)
    images, labels = batch(name)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    out = entprop.training_step(model, images, labels, method=METHOD)
    assert torch.isfinite(out.loss)
    expected = expected_step(plain, copies, out, images, labels)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    found = [
        {n: p.grad for n, p in parameters.items() if not is_auxiliary_key(n)},
        {original_name(n): p.grad for n, p in parameters.items() if is_auxiliary_key(n)},
        {n: b for n, b in buffers.items() if not is_auxiliary_key(n)},
        {original_name(n): b for n, b in buffers.items() if is_auxiliary_key(n)},
    ]
    for what, ours, theirs in zip(
        ("gradient", "gradient of copy", "buffer", "buffer of copy"), found, expected, strict=True
    ):
        assert_close(ours, theirs, what)
    assert any(gradient is not None and gradient.any() for gradient in found[1].values())

    trainer, recorded = trainer_of(name, tmp_path, in_trainer, remove_unused_columns=name not in NO_LOSS)
    trainer.train()
    assert sum("main_loss" in log for log in trainer.state.log_history) == 1
    assert worst(recorded.steps, [{n: p.grad for n, p in parameters.items() if p.grad is not None}]) < 1e-3

    torch.optim.SGD(model.parameters(), lr=1.0).step()
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved <= {key for key, value in parameters.items() if value.grad is not None and value.grad.any()}
    assert any(map(is_auxiliary_key, moved))
    assert all(bool(value.isfinite().all()) for value in parameters.values())
    assert list(entprop.unwrap(model).state_dict()) == keys


@pytest.mark.parametrize("name", sorted(NO_LOSS & set(KINDS)))
def test_a_model_without_a_loss_says_how_to_give_one(name, tmp_path):
    trainer, _ = trainer_of(name, tmp_path, build_tiny(name), remove_unused_columns=False)
    trainer.compute_loss_func = None
    with pytest.raises(UnsupportedModelError, match="compute_loss_func"):
        trainer.train()


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(KINDS)))
def test_what_takes_no_images_is_refused(name):
    model = entprop.wrap(build_tiny(name))
    with pytest.raises(EntPropError, match=REFUSED[name]):
        entprop.training_step(model, *batch(name))


def test_the_trainer_refuses_what_takes_patches_with_shapes(tmp_path):
    with pytest.raises(UnsupportedModelError, match="patches"):
        trainer_of("Siglip2ForImageClassification", tmp_path, build_tiny("Siglip2ForImageClassification"))


@pytest.mark.parametrize("name", sorted(set(NEEDS) & set(KINDS)))
def test_what_needs_another_package_does_not_build(name):
    if importlib.util.find_spec(NEEDS[name]):
        pytest.fail(f"{NEEDS[name]} is here: take {name} out of NEEDS")
    with pytest.raises(ImportError, match=NEEDS[name]):
        build_tiny(name)


@pytest.mark.parametrize("name", sorted(BROKEN & set(KINDS)))
def test_what_is_broken_does_not_build(name):
    with pytest.raises(AttributeError):
        build_tiny(name)


def test_the_lists_are_exact():
    assert {name for name in GONE if name not in KINDS} == (set() if OLD else GONE)
    for listed in (set(NEEDS), set(REFUSED), BROKEN, NO_LOSS):
        assert listed - set(KINDS) <= GONE | {"PPLCNetForImageClassification"}
    assert set(EXCEPTIONS) - set(KINDS.values()) <= {"efficientformer", "pp_lcnet"}
    assert all(hasattr(transformers, name) for name in KINDS)
