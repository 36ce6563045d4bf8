"""Real architectures x behaviours: every row of the table in docs/works_with.md is a test of this file."""

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


class Row:
    """One architecture: plain, wrapped with its copies perturbed, and what a pass of each domain must give."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture, self.images = architecture, architecture.images()
        self.plain, self.wrapped = architecture.build(), entprop.wrap(architecture.build())
        perturb(self.wrapped)
        self.states = [(model, copy.deepcopy(model.state_dict())) for model in (self.plain, self.wrapped)]
        self.main = expected_pass(self.plain, self.images)
        self.aux = expected_pass(self.plain, self.images, auxiliary_tensors(self.wrapped))
        assert not torch.equal(self.main.logits, self.aux.logits), "the copies were not perturbed"

    def reset(self):
        """Put both models back to where they began, for the next behaviour."""
        for model, state in self.states:
            model.float().train().load_state_dict(state)
            model.zero_grad()

    def forward(self, model, auxiliary=None):
        torch.manual_seed(3)
        with entprop.auxiliary(model, auxiliary):
            return model(self.images)

    def check_auxiliary_pass(self, model):
        output = self.forward(model, "aux")
        loss_of(output, self.images).backward()
        assert_same(observed_pass(model, output), self.aux)


def unchanged_outputs(row):
    """Wrapping changes no output and no statistic, in training and in eval mode."""
    for training in (True, False):
        outputs = []
        for each in (row.plain, row.wrapped):
            torch.manual_seed(3)
            outputs.append(logits_of(each.train(training)(row.images)))
        assert torch.equal(*outputs)
    main = entprop.main_state_dict(row.wrapped)
    torch.testing.assert_close(main, row.plain.state_dict(), rtol=0, atol=0)


def auxiliary_pass(row):
    """An auxiliary pass equals the plain model run on the copies, and touches nothing of the main norms."""
    before = snapshot(row.wrapped)
    row.check_auxiliary_pass(row.wrapped)
    assert all(is_auxiliary_key(name) for name in changed(row.wrapped, before))
    for module in row.wrapped.modules():
        if isinstance(module, SwitchedNorm):
            assert all(p.grad is None for p in module._parameters.values() if p is not None)


def main_pass(row):
    """A main pass equals the plain model, and touches nothing of the copies."""
    model, before = row.wrapped, snapshot(row.wrapped)
    output = row.forward(model)
    loss_of(output, row.images).backward()
    assert_same(observed_pass(model, output, auxiliary=None), row.main)
    assert not any(is_auxiliary_key(name) for name in changed(model, before))
    assert all(p.grad is None for name, p in model.named_parameters() if is_auxiliary_key(name))


def unwrapping(row):
    """After a pass of each kind, ``unwrap`` gives back classes, keys, hooks, attributes and bytes."""
    plain, model = row.plain, copy.deepcopy(row.wrapped)
    inside = {name: set(vars(module)) for name, module in plain.named_modules()}
    torch.manual_seed(3)
    plain(row.images)
    row.forward(model, "aux")
    row.forward(model)
    assert entprop.unwrap(model) is model
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    for name, module in model.named_modules():
        assert set(vars(module)) == inside[name]
        ours = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        theirs = {key: len(value) for key, value in vars(plain.get_submodule(name)).items() if key.endswith("_hooks")}
        assert ours == theirs
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


def state_dicts(row):
    """A plain checkpoint loads into a wrapped model, and the main part of a wrapped one into a plain model."""
    model = row.wrapped
    main, copies = entprop.main_state_dict(model), entprop.auxiliary_state_dict(model)
    assert list(main) == list(row.plain.state_dict())
    assert copies
    row.plain.load_state_dict(main)
    fresh = entprop.wrap(row.architecture.build())
    fresh.load_state_dict({name: tensor.clone() for name, tensor in main.items()})
    for name, norm, copied in fresh._entprop_registry.copied_parameters():
        assert torch.equal(norm, copied), name
    entprop.load_auxiliary_state_dict(fresh, copies)
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)
    fresh.load_state_dict(model.state_dict())


def deep_copying(row):
    """A deep copy has a switch of its own, and works without touching the original."""
    before, twin = snapshot(row.wrapped), copy.deepcopy(row.wrapped)
    torch.manual_seed(3)
    with entprop.auxiliary(twin):
        outside = row.wrapped.eval()(row.images)
    torch.testing.assert_close(logits_of(outside), logits_of(row.plain.eval()(row.images)))
    row.check_auxiliary_pass(twin)
    entprop.unwrap(twin)
    assert not changed(row.wrapped, before)
    assert any(is_auxiliary_key(name) for name in row.wrapped.state_dict())


def pickling(row):
    """``torch.save`` of the whole model round-trips."""
    file = io.BytesIO()
    torch.save(row.wrapped, file)
    file.seek(0)
    row.check_auxiliary_pass(torch.load(file, weights_only=False))


def double_precision(row):
    """``.double()`` moves the copies too, and passes stay exact."""
    plain, model = row.plain.double(), row.wrapped.double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    images = row.images.double()
    expected = expected_pass(plain, images, auxiliary_tensors(model))
    torch.manual_seed(3)
    with entprop.auxiliary(model):
        output = model(images)
    torch.testing.assert_close(logits_of(output), expected.logits, rtol=1e-12, atol=1e-12)


def averaging(row):
    """An averaged model averages the copies with everything else, and its copies can be run."""
    model = row.wrapped
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
        assert not torch.equal(logits_of(row.forward(averaged, "aux")), logits_of(row.forward(averaged)))


def checkpointing(row):
    """Activation checkpointing, with the backward after the block, and of both domains at once."""
    model, main, aux = row.wrapped, row.main.gradients, row.aux.gradients
    row.architecture.enable_checkpointing(model)
    state, before = copy.deepcopy(model.state_dict()), snapshot(model)

    output = row.forward(model, "aux")
    loss_of(output, row.images).backward()
    assert all(is_auxiliary_key(name) for name in changed(model, before))
    found, expected = observed_pass(model, output), copy.copy(row.aux)
    found.buffers = expected.buffers = {}  # recomputing records statistics twice, in any model
    assert_same(found, expected)
    model.zero_grad()
    model.load_state_dict(state)

    outputs = row.forward(model), row.forward(model, "aux")
    sum(loss_of(output, row.images) for output in outputs).backward()
    for name, norm, copied in model._entprop_registry.copied_parameters():
        if main[name] is not None:
            torch.testing.assert_close(norm.grad, main[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(copied.grad, aux[name], rtol=1e-5, atol=1e-6)


#: The columns of the table: title, check, and below whether it applies to an architecture.
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


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_row(architecture):
    row = Row(architecture)
    for title, behaviour in BEHAVIOURS.items():
        if applies(title, architecture):
            row.reset()
            behaviour(row)
