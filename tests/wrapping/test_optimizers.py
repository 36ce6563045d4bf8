"""Optimizers and the copies: groups, and the guard before a first step."""

import copy
import pickle

import pytest
import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError, OptimizerMismatchError, UnsupportedModelError
from entprop_wrap.wrapping import check_optimizer
from tests.helpers.keys import is_auxiliary_key, original_name
from tests.helpers.norm_nets import rows, toy
from tests.helpers.oracle import changed, loss_of, snapshot


def _backward(model):
    for auxiliary in (None, "aux"):
        with entprop.auxiliary(model, auxiliary):
            loss_of(model(rows()), rows()).backward()


def test_an_optimizer_from_before_wrap_raises_before_it_moves_a_weight():
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    entprop.wrap(model)
    _backward(model)
    before = snapshot(model)
    for _ in range(2):  # and not only once
        with pytest.raises(OptimizerMismatchError, match=r"10 of 10 copies are missing.*built before wrap"):
            optimizer.step()
    assert not changed(model, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_is_guarded_as_well(copied):
    model = copied(entprop.wrap(toy()))
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if not is_auxiliary_key(name)], lr=0.1)
    _backward(model)
    with pytest.raises(OptimizerMismatchError, match="10 of 10 copies are missing"):
        optimizer.step()


def test_norms_that_are_thawed_without_their_copies_raise():
    model = toy().requires_grad_(False)
    norms = list(model.last.parameters())
    model.blocks.requires_grad_(True)
    entprop.wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    _backward(model)
    optimizer.step()
    for parameter in norms:
        parameter.requires_grad_(True)
    optimizer.add_param_group({"params": norms})
    with pytest.raises(OptimizerMismatchError, match=r"'last\.weight', whose auxiliary copy is frozen.*Thaw"):
        optimizer.step()
    copies = [p.requires_grad_(True) for name, p in model.named_parameters() if name.startswith("last.entprop_")]
    optimizer.add_param_group({"params": copies})
    optimizer.step()


@pytest.mark.parametrize("auxiliary", [None, "aux"])
def test_an_optimizer_that_steps_inside_the_backward(auxiliary):
    model = entprop.wrap(toy())
    before = snapshot(model)
    for parameter in model.parameters():  # as GaLore and APOLLO do, layer by layer
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda parameter, optimizer=optimizer: optimizer.step())
    with entprop.auxiliary(model, auxiliary):
        loss = loss_of(model(rows()), rows())
    with pytest.raises(UnsupportedModelError, match=r"inside a backward.*without layer-wise updates"):
        loss.backward()
    assert not changed(model, before)


def test_other_models_may_step_inside_their_backward():
    entprop_model, model = entprop.wrap(toy()), toy(seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model)
    model.stem.weight.register_post_accumulate_grad_hook(lambda parameter: optimizer.step())
    loss_of(model(rows()), rows()).backward()
    assert changed(model, before)
    assert entprop_model._entprop_registry.switch.pins == {}


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS], ids=lambda cls: cls.__name__)
def test_every_kind_of_optimizer_is_guarded(make):
    model = toy()
    optimizer = make(model.parameters(), lr=0.1)
    entprop.wrap(model)
    _backward(model)
    with pytest.raises(OptimizerMismatchError):
        optimizer.step(lambda: torch.zeros(()))


def test_an_optimizer_from_after_wrap_moves_the_copies():
    model = entprop.wrap(toy())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    check_optimizer(model, optimizer)
    before = snapshot(model)
    _backward(model)
    optimizer.step()
    assert changed(model, before) == set(before)


def _without_norms(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(False)
    return [model.parameters()]


@pytest.mark.parametrize(
    "parts",
    [
        lambda model: [model.head.parameters()],
        lambda model: [toy(seed=1).parameters(), nn.LayerNorm(8).parameters()],
        _without_norms,
    ],
    ids=["the head", "other models", "frozen norms"],
)
def test_optimizers_from_before_wrap_that_train_no_norm_of_the_model(parts):
    model = toy()
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in parts(model)]
    entprop.wrap(model)
    _backward(model)
    for optimizer in optimizers * 2:
        optimizer.step()
        check_optimizer(model, optimizer)


def test_optimizers_of_several_models_and_of_parts_of_one():
    models = [entprop.wrap(toy(seed=seed)) for seed in range(2)]
    optimizers = [torch.optim.SGD(model.blocks.parameters(), lr=0.1) for model in models]
    optimizers += [torch.optim.SGD([*model.last.parameters(), *model.head.parameters()], lr=0.1) for model in models]
    for model in models:
        _backward(model)
    for optimizer in optimizers * 2:
        optimizer.step()


def test_the_second_of_two_optimizers_is_checked_too():
    model = toy()
    stale = torch.optim.SGD(model.last.parameters(), lr=0.1)
    entprop.wrap(model)
    fresh = torch.optim.SGD(model.blocks.parameters(), lr=0.1)
    _backward(model)
    fresh.step()
    with pytest.raises(OptimizerMismatchError, match=r"'last\.weight'.*2 of 2"):
        stale.step()


def test_after_unwrap_nothing_is_guarded():
    model = entprop.wrap(toy())
    registry = model._entprop_registry  # an exception's traceback may hold it, say
    entprop.unwrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model(rows()), rows()).backward()
    optimizer.step()
    assert list(registry.copied_parameters()) == []


def test_groups_put_a_copy_where_its_norm_goes():
    model = entprop.wrap(toy("batch"), auxiliaries=("one", "two"))
    decayed, undecayed = entprop.parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.05, 0.0)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{named[id(p)] for p in group["params"]} for group in (decayed, undecayed)]
    assert groups[0] | groups[1] == set(named.values())
    assert not groups[0] & groups[1]
    assert groups[0] == {"stem.weight", "head.weight", "blocks.0.linear.weight", "blocks.1.linear.weight"}
    assert sum(is_auxiliary_key(name) for name in groups[1]) == 2 * 2 * 5


def test_groups_by_a_rule_of_ones_own():
    model = entprop.wrap(toy())
    seen = []

    def no_decay(name, parameter):
        seen.append(name)
        return name.startswith("last.")

    decayed, undecayed = entprop.parameter_groups(torch.compile(model, backend="eager"), 0.1, no_decay=no_decay)
    assert {id(p) for p in undecayed["params"]} == {id(p) for p in model.last.parameters()}
    assert not any(is_auxiliary_key(name) for name in seen)
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(model.parameters()))


def test_groups_of_a_plain_model():
    plain, wrapped = toy(), entprop.wrap(toy())
    for mine, theirs in zip(entprop.parameter_groups(plain, 0.1), entprop.parameter_groups(wrapped, 0.1), strict=True):
        names = {id(p): name for name, p in wrapped.named_parameters()}
        main = [p for p in theirs["params"] if not is_auxiliary_key(names[id(p)])]
        assert [p.shape for p in mine["params"]] == [p.shape for p in main]
        assert all(original_name(names[id(p)]) in dict(plain.named_parameters()) for p in theirs["params"])


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out():
    model = toy()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("last"))
    groups = entprop.parameter_groups(entprop.wrap(model), 0.1)
    assert [len(group["params"]) for group in groups] == [4]


@pytest.mark.parametrize("decay", [-1, float("nan"), float("inf"), "0.1", None, True])
def test_decay_that_is_not_a_number_of_at_least_zero(decay):
    with pytest.raises(ConfigurationError, match="weight_decay must be a number of at least 0, found"):
        entprop.parameter_groups(toy(), decay)


def test_a_rule_that_is_no_function():
    with pytest.raises(ConfigurationError, match="no_decay must be a function"):
        entprop.parameter_groups(toy(), 0.1, no_decay=["bias"])


def test_groups_that_come_later_are_checked_too():
    model = entprop.wrap(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": [model[1].weight, model[1].bias]})
    with pytest.raises(OptimizerMismatchError):
        optimizer.step()
