"""``wrap(copies=)``: domains that share their norms' affine parameters or running statistics, against the oracle."""

import copy
import pickle

import pytest
import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap import EntProp
from entprop_wrap.diagnostics import domain_gap
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.methods import FastAdvProp
from tests.helpers.norm_nets import rows, toy
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

SHARING = pytest.mark.parametrize("copies", ["affine", "statistics"])


def _pair(copies, mode="none", depth=2):
    plain = toy("batch", depth=depth).double()
    model = entprop.wrap(toy("batch", mode, depth=depth).double(), copies=copies)
    perturb(model)
    return plain, model


def _check(model, plain, copies, auxiliary, batch, call=None, statistics=True):
    """One pass of ``model`` gives what ``plain`` gives with the tensors that the domain has of its own."""
    plain.load_state_dict(entprop.main_state_dict(model))
    expected = expected_pass(plain, batch, None if auxiliary is None else auxiliary_tensors(model))
    before = dict(plain.named_buffers())
    model.zero_grad()
    with entprop.auxiliary(model, auxiliary):
        output = (model if call is None else call)(batch)
    loss_of(output, batch).backward()
    found = observed_pass(model, output, auxiliary)
    if copies == "affine" and auxiliary is not None:
        expected.buffers = before  # the main domain's, which an auxiliary pass leaves alone
    if not statistics:  # a recomputation records them twice, in any model
        found.buffers = expected.buffers = {}
    assert_same(found, expected, 1e-9)


@SHARING
@pytest.mark.parametrize(("mode", "training"), [("none", True), ("none", False), ("plain", True), ("nested", True)])
def test_each_domain_is_exact(copies, mode, training):
    plain, model = _pair(copies, mode)
    for module in (plain, model):
        module.train(training)
    for seed, auxiliary in enumerate(("aux", None, "aux")):
        batch = rows(seed=seed).double().requires_grad_()
        _check(model, plain, copies, auxiliary, batch, statistics=mode == "none")


@SHARING
def test_compiled(copies):
    torch._dynamo.reset()
    plain, model = _pair(copies, depth=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for auxiliary in ("aux", None, "aux"):
        _check(model, plain, copies, auxiliary, rows().double(), compiled)


@SHARING
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_duplicates_share_nothing_with_the_original(copies, duplicate):
    plain, model = _pair(copies)
    twin = duplicate(model)
    before = snapshot(model)
    for auxiliary in ("aux", None):
        _check(twin, plain, copies, auxiliary, rows().double())
    assert not changed(model, before)
    entprop.unwrap(model)
    _check(twin, plain, copies, "aux", rows().double())


def test_which_tensors_are_copied():
    model = entprop.wrap(toy("batch"), copies="statistics")
    assert list(model.blocks[0].inner.entprop_aux.state_dict()) == [
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]
    assert not hasattr(model.last, "entprop_aux")  # a layer norm keeps no statistics: it is shared
    assert entprop.summary(model).added == 0
    assert str(entprop.summary(model)).startswith("Toy: 2 norm layers (2 BatchNorm1d), +0 parameters")
    model = entprop.wrap(toy("batch"), copies="affine")
    assert list(model.blocks[0].inner.entprop_aux.state_dict()) == ["weight", "bias"]
    assert list(model.last.entprop_aux.state_dict()) == ["weight", "bias"]


@SHARING
def test_state_dicts_and_unwrapping(copies):
    plain, model = _pair(copies)
    state, auxiliary = copy.deepcopy(model.state_dict()), entprop.auxiliary_state_dict(model)
    assert entprop.main_state_dict(model).keys() == plain.state_dict().keys()
    other = entprop.wrap(toy("batch", seed=5).double(), copies=copies)
    other.load_state_dict(state)
    entprop.load_auxiliary_state_dict(other, auxiliary)
    _check(other, plain, copies, "aux", rows().double())

    other = entprop.wrap(toy("batch", seed=5).double(), copies=copies)
    other.load_state_dict(toy("batch", seed=6).double().state_dict())  # of the plain model: copies start from it
    for norm in (other.blocks[0].inner, other.blocks[1].inner):
        for name, tensor in norm.entprop_aux.state_dict().items():
            assert torch.equal(tensor, getattr(norm, name))

    assert entprop.unwrap(other).state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in other.modules()] == [type(module) for module in plain.modules()]


def test_an_optimizer_built_before_misses_nothing_where_parameters_are_shared():
    model = toy("batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    entprop.wrap(model, copies="statistics")
    loss_of(model(rows()), rows()).backward()
    optimizer.step()


def test_statistics_without_affine_parameters_are_not_mixed():
    model = entprop.wrap(
        nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.Linear(8, 5), nn.LayerNorm(5)), copies="affine"
    )
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    with entprop.auxiliary(model):
        model(rows())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)])
def test_norms_that_keep_no_statistics_are_all_shared(norm):
    images, labels = _images()
    layers = nn.Conv2d(3, 8, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    plain = nn.Sequential(*layers).double()
    model = entprop.wrap(copy.deepcopy(plain), copies="statistics")
    assert model.state_dict().keys() == plain.state_dict().keys()
    for net, auxiliary in ((model, "aux"), (plain, None)):
        method = EntProp.augmented(auxiliary=auxiliary)
        entprop.training_step(net, images, labels, method=method, generator=torch.Generator().manual_seed(0))
    for shared, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(shared.grad, expected.grad)
    for _ in range(2):
        entprop.training_step(model, images, labels, method=EntProp.augmented(lagged=True))
    assert type(entprop.unwrap(model)[1]) is type(norm)


@pytest.mark.parametrize(
    ("net", "copies", "message"),
    [
        (lambda: nn.BatchNorm1d(8, affine=False), "affine", "BatchNorm1d.* has affine parameters"),
        (toy, "means", "'all', 'affine' or 'statistics', found 'means'"),
    ],
)
def test_nothing_to_copy(net, copies, message):
    model = net()
    keys = model.state_dict().keys()
    with pytest.raises(ConfigurationError, match=message):
        entprop.wrap(model, copies=copies)
    assert not hasattr(model, "_entprop_registry")
    assert model.state_dict().keys() == keys


def _conv_net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return nn.Sequential(*layers).double()


def _images():
    return torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double(), torch.arange(40) % 5


@SHARING
def test_a_step_of_entprop_adds_both_gradients_of_what_is_shared(copies):
    images, labels = _images()
    model = entprop.wrap(_conv_net(), copies=copies)
    output = entprop.training_step(model, images, labels, method=EntProp(fraction=0.5, mix=None, epsilon=0.05))
    plain = _conv_net()
    main = torch.nn.functional.cross_entropy(plain(images), labels)
    aux = torch.nn.functional.cross_entropy(plain(output.aux_images), labels[output.selected])
    weight, after_main = plain[1].weight, torch.autograd.grad(main, plain[1].weight)[0]
    after_aux = torch.autograd.grad(0.5 * aux, weight)[0]
    if copies == "statistics":
        torch.testing.assert_close(model[1].weight.grad, after_main + after_aux)
    else:
        torch.testing.assert_close(model[1].weight.grad, after_main)
        torch.testing.assert_close(model[1].entprop_aux.weight.grad, after_aux)


def test_shared_parameters_are_not_rebalanced():
    # Fast AdvProp scales up the gradients of norms that see a part of the batch; shared ones see all of it.
    images, labels = _images()
    method = FastAdvProp(fraction=0.5)
    gradients = {}
    for copies in ("all", "statistics"):
        model = entprop.wrap(_conv_net(), copies=copies)
        torch.manual_seed(2)
        entprop.training_step(model, images, labels, method=method)
        gradients[copies] = model[1]
    own, shared = gradients["all"], gradients["statistics"]
    expected = 0.5 * (own.weight.grad + own.entprop_aux.weight.grad)
    torch.testing.assert_close(shared.weight.grad, expected)


def test_the_gap_is_that_of_what_is_copied():
    gaps = {
        copies: domain_gap(entprop.wrap(_conv_net(), copies=copies)).layers[0] for copies in ("affine", "statistics")
    }
    assert gaps["affine"].parameters == {"weight": 0.0, "bias": 0.0}
    assert gaps["affine"].statistics is None
    assert gaps["statistics"].parameters == {}
    assert gaps["statistics"].statistics == 0.0
