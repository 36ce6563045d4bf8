"""Real architectures x behaviours: every cell of the README's table is a test of this file."""

import copy
import io

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import entprop_wrap as entprop
from entprop_wrap.wrapping.switched_norm import SwitchedNorm
from tests.helpers.architectures import ARCHITECTURES, Architecture, logits_of
from tests.helpers.keys import is_auxiliary_key
from tests.helpers.oracle import (
    assert_same,
    auxiliary_tensors,
    changed,
    expected_pass,
    loss_of,
    observed_pass,
    perturb,
    snapshot,
)


def _forward(model, images, seed=3):
    torch.manual_seed(seed)
    return model(images)


def _wrapped(architecture: Architecture):
    """Return ``(plain, wrapped, images)``, the copies perturbed."""
    plain = architecture.build()
    model = entprop.wrap(copy.deepcopy(plain))
    perturb(model)
    return plain, model, architecture.images()


def _check_auxiliary_pass(plain, model, images, tolerance=1e-6):
    expected = expected_pass(plain, images, auxiliary_tensors(model))
    model.zero_grad()
    with entprop.auxiliary(model):
        output = _forward(model, images)
        loss_of(output, images).backward()
    assert_same(observed_pass(model, output), expected, tolerance)


def unchanged_outputs(architecture):
    """Wrapping changes no output and no statistic, in training and in eval mode."""
    plain, images = architecture.build(), architecture.images()
    model = entprop.wrap(copy.deepcopy(plain))
    for training in (True, False):
        plain.train(training)
        model.train(training)
        assert torch.equal(logits_of(_forward(model, images)), logits_of(_forward(plain, images)))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def auxiliary_pass(architecture):
    """An auxiliary pass equals the plain model run on the copies, and touches nothing of the main norms."""
    plain, model, images = _wrapped(architecture)
    expected = expected_pass(plain, images, auxiliary_tensors(model))
    before = snapshot(model)
    with entprop.auxiliary(model):
        output = _forward(model, images)
        loss_of(output, images).backward()
    assert_same(observed_pass(model, output), expected)
    assert all(is_auxiliary_key(name) for name in changed(model, before))
    for module in model.modules():
        if isinstance(module, SwitchedNorm):
            assert all(p.grad is None for p in module._parameters.values() if p is not None)
    assert not torch.equal(logits_of(output), logits_of(_forward(plain, images))), "the copies were not perturbed"


def main_pass(architecture):
    """A main pass equals the plain model, and touches nothing of the copies."""
    plain, model, images = _wrapped(architecture)
    expected = expected_pass(plain, images)
    before = snapshot(model)
    output = _forward(model, images)
    loss_of(output, images).backward()
    assert_same(observed_pass(model, output, auxiliary=None), expected)
    assert not any(is_auxiliary_key(name) for name in changed(model, before))
    assert all(p.grad is None for name, p in model.named_parameters() if is_auxiliary_key(name))


def unwrapping(architecture):
    """After a pass of each kind, ``unwrap`` gives back classes, keys, hooks, attributes and bytes."""
    plain, model, images = _wrapped(architecture)
    inside = {name: set(vars(module)) for name, module in plain.named_modules()}
    _forward(plain, images)
    with entprop.auxiliary(model):
        _forward(model, images)
    loss_of(_forward(model, images), images).backward()
    same = entprop.unwrap(model)
    assert same is model
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    for name, module in model.named_modules():
        assert set(vars(module)) == inside[name]
        ours = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        theirs = {key: len(value) for key, value in vars(plain.get_submodule(name)).items() if key.endswith("_hooks")}
        assert ours == theirs
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def state_dicts(architecture):
    """A plain checkpoint loads into a wrapped model, and the main part of a wrapped one into a plain model."""
    plain, model, images = _wrapped(architecture)
    with entprop.auxiliary(model):
        _forward(model, images)
    main, copies = entprop.main_state_dict(model), entprop.auxiliary_state_dict(model)
    assert list(main) == list(plain.state_dict())
    assert copies
    plain.load_state_dict(main)
    fresh = entprop.wrap(architecture.build())
    fresh.load_state_dict({name: tensor.clone() for name, tensor in main.items()})
    for name, norm, mirror in fresh._entprop_registry.mirrors():
        assert torch.equal(norm, mirror), name
    entprop.load_auxiliary_state_dict(fresh, copies)
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in model.state_dict().items())
    fresh.load_state_dict(model.state_dict())


def deep_copying(architecture):
    """A deep copy has a switch of its own, and works without touching the original."""
    plain, model, images = _wrapped(architecture)
    before = snapshot(model)
    _check_auxiliary_pass(plain, copy.deepcopy(model), images)
    assert not changed(model, before)
    twin = copy.deepcopy(model)
    with entprop.auxiliary(twin):
        torch.testing.assert_close(logits_of(_forward(model, images)), logits_of(_forward(plain, images)))
    entprop.unwrap(twin)
    assert any(is_auxiliary_key(name) for name in model.state_dict())


def pickling(architecture):
    """``torch.save`` of the whole model round-trips."""
    plain, model, images = _wrapped(architecture)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    _check_auxiliary_pass(plain, torch.load(file, weights_only=False), images)


def double_precision(architecture):
    """``.double()`` moves the copies too, and passes stay exact."""
    plain, model, images = _wrapped(architecture)
    plain, model = plain.double(), model.double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    _check_auxiliary_pass(plain, model, images.double(), tolerance=1e-12)


def averaging(architecture):
    """An averaged model averages the copies with everything else, and its copies can be run."""
    _, model, images = _wrapped(architecture)
    averaged = AveragedModel(model, avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new, use_buffers=False)
    averaged.update_parameters(model)
    before = snapshot(averaged.module)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    averaged.update_parameters(model)
    for name, parameter in averaged.module.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.05)
    averaged.module.eval()
    with torch.no_grad():
        main = logits_of(_forward(averaged, images))
        with entprop.auxiliary(averaged):
            assert not torch.equal(logits_of(_forward(averaged, images)), main)


def checkpointing(architecture):
    """Activation checkpointing, with the backward inside the block, after it, and of both domains at once."""
    plain, model, images = _wrapped(architecture)
    architecture.enable_checkpointing(model)
    main, aux = expected_pass(plain, images), expected_pass(plain, images, auxiliary_tensors(model))
    state = copy.deepcopy(model.state_dict())

    def check(output, expected, auxiliary):
        found = observed_pass(model, output, auxiliary)
        found.buffers, expected.buffers = {}, {}  # recomputing records statistics twice, in any model
        assert_same(found, expected)
        model.zero_grad()
        model.load_state_dict(state)

    with entprop.auxiliary(model):
        output = _forward(model, images)
        loss_of(output, images).backward()
    check(output, aux, "aux")

    before = snapshot(model)
    with entprop.auxiliary(model):
        output = _forward(model, images)
    loss_of(output, images).backward()
    assert all(is_auxiliary_key(name) for name in changed(model, before))
    check(output, aux, "aux")

    output = _forward(model, images)
    with entprop.auxiliary(model):
        loss_of(output, images).backward()
    check(output, main, None)

    first = _forward(model, images)
    with entprop.auxiliary(model):
        second = _forward(model, images)
    (loss_of(first, images) + loss_of(second, images)).backward()
    for name, norm, mirror in model._entprop_registry.mirrors():
        if main.gradients[name] is not None:
            torch.testing.assert_close(norm.grad, main.gradients[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mirror.grad, aux.gradients[name], rtol=1e-5, atol=1e-6)


#: The columns of the README's table: title, test, and whether it applies to an architecture.
BEHAVIOURS = {
    "same outputs": unchanged_outputs,
    "auxiliary pass": auxiliary_pass,
    "main pass": main_pass,
    "unwrap": unwrapping,
    "state dicts": state_dicts,
    "deepcopy": deep_copying,
    "pickle": pickling,
    "dtype": double_precision,
    "EMA": averaging,
    "checkpointing": checkpointing,
}


def applies(behaviour: str, architecture: Architecture) -> bool:
    return behaviour != "checkpointing" or architecture.enable_checkpointing is not None


CELLS = [(a, b) for a in ARCHITECTURES for b in BEHAVIOURS if applies(b, a)]


@pytest.mark.parametrize(
    ("architecture", "behaviour"), CELLS, ids=[f"{a.name}-{b}".replace(" ", "-") for a, b in CELLS]
)
def test_cell(architecture, behaviour):
    BEHAVIOURS[behaviour](architecture)


def test_the_table_is_wide_enough():
    assert len(ARCHITECTURES) >= 20
    assert {a.name.split("/")[0] for a in ARCHITECTURES} == {"torchvision", "timm", "transformers"}
