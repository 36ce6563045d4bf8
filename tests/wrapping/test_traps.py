"""What breaks a switch without a trace elsewhere works here, or raises and says what to write instead."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import entprop_wrap as entprop
from entprop_wrap.errors import (
    AlreadyWrappedError,
    AuxiliaryNameError,
    CheckpointError,
    ConfigurationError,
    NotWrappedError,
    UnsupportedModelError,
)
from entprop_wrap.methods import Vanilla
from entprop_wrap.wrapping import check_optimizer, is_wrapped, without_copies
from entprop_wrap.wrapping.switched_norm import SwitchedNorm
from tests.helpers.keys import is_auxiliary_key
from tests.helpers.norm_nets import Toy, rows, toy
from tests.helpers.oracle import (
    assert_pass,
    auxiliary_tensors,
    changed,
    expected_pass,
    loss_of,
    perturb,
    snapshot,
)


def _conv_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def _is_untouched(model):
    return not any(isinstance(module, SwitchedNorm) for module in model.modules()) and not any(
        is_auxiliary_key(key) for key in model.state_dict()
    )


def _refuses_to_switch(model, message):
    with pytest.raises(UnsupportedModelError, match=message), entprop.auxiliary(model):
        pass


# Changes after wrap


def _timm(name):
    return lambda model: getattr(pytest.importorskip("timm.layers"), name)(model)


def _setting(name, make):
    """Return a change that sets an attribute of a part, such as "last.forward", to ``make(model)``."""

    def change(model):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, make(model))

    return change


class _Positive(nn.Module):
    def forward(self, weight):
        return weight.exp()


CHANGES = {
    "sync": (_conv_net, nn.SyncBatchNorm.convert_sync_batchnorm, "1 norm layers were replaced.*'1'.*before wrap"),
    "freeze": (_conv_net, _timm("freeze_batch_norm_2d"), "1 norm layers were replaced after wrap"),
    "timm": (_conv_net, _timm("convert_sync_batchnorm"), "1 norm layers were replaced after wrap"),
    "head": (toy, _setting("last", lambda model: nn.LayerNorm(8)), "1 norm layers were replaced after wrap.*'last'"),
    "copy": (toy, _setting("last.entprop_aux", lambda model: nn.LayerNorm(8)), "the copy in 'last' was replaced"),
    "forward": (
        toy,
        _setting("last.forward", lambda model: model.stem.forward),
        "'last' was given a forward.. of its own after wrap",
    ),
    "parametrised": (
        toy,
        lambda model: parametrize.register_parametrization(model.last, "weight", _Positive()),
        "'last' was parametrised",
    ),
    "pruned": (toy, lambda model: prune.l1_unstructured(model.last, "weight", 0.5), "'last' was .*pruned"),
    "weight norm": (toy, lambda model: parametrizations.weight_norm(model.last), "'last' was parametrised"),
    "copied part": (
        toy,
        lambda model: model.blocks.append(copy.deepcopy(model.blocks[0])),
        "2 norm layers are copies taken out of a wrapped model",
    ),
    "copied part in its place": (
        toy,
        _setting("blocks.0", lambda model: copy.deepcopy(model.blocks[0])),
        "replaced after wrap.*; 2 norm layers are copies",
    ),
}


NEW = {
    "a new head": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)),
    "an adapter": lambda: nn.LayerNorm(8),
}


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("copied", [True, False])
def test_norms_that_come_after_wrap_are_noticed(name, copied):
    model = entprop.wrap(_conv_net())
    model = copy.deepcopy(model) if copied else model
    with entprop.auxiliary(model):
        pass
    model.add_module("more", NEW[name]().eval())
    with entprop.auxiliary(model):  # in evaluation mode it records nothing
        pass
    model.train()
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"1 norm layers were added after wrap.*'more"):
            entprop.training_step(model, torch.rand(8, 3, 8, 8), torch.arange(8) % 5)


@pytest.mark.parametrize("copied", [True, False])
def test_norms_that_are_shared_on_purpose_are_no_news(copied):
    norm = nn.LayerNorm(5)  # in two places
    model = entprop.wrap(nn.Sequential(_conv_net(), norm, nn.Tanh(), norm), exclude=nn.LayerNorm)
    model = copy.deepcopy(model) if copied else model
    entprop.training_step(model.train(), torch.rand(8, 3, 8, 8), torch.arange(8) % 5)


@pytest.mark.parametrize("name", CHANGES)
def test_norms_that_are_changed_after_wrap_are_noticed(name):
    make, change, message = CHANGES[name]
    model = entprop.wrap(make())
    change(model)
    with pytest.raises(UnsupportedModelError, match=message), entprop.auxiliary(model):
        pass
    with pytest.raises(UnsupportedModelError, match=message):
        entprop.training_step(model.train(), torch.rand(8, 3, 8, 8), torch.arange(8) % 5)


def test_unwrapping_after_a_conversion_leaves_no_copies():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(entprop.wrap(_conv_net()))
    entprop.unwrap(model)
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert _is_untouched(model)
    assert not model._forward_hooks


def test_sync_batch_norm_before_wrap_is_switched():
    model = entprop.wrap(nn.SyncBatchNorm.convert_sync_batchnorm(_conv_net()))
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert isinstance(model[1], SwitchedNorm)
    assert entprop.summary(model).norms == {"SyncBatchNorm": 1}
    before, images = snapshot(model), torch.randn(2, 3, 8, 8)
    model.eval()  # a SyncBatchNorm refuses the CPU in training mode
    with entprop.auxiliary(model):
        loss_of(model(images), images).backward()
    assert model[1].weight.grad is None
    assert model[1].entprop_aux.weight.grad is not None
    assert not changed(model, before)
    entprop.unwrap(model)
    assert type(model[1]) is nn.SyncBatchNorm


# Wrapping twice, a part, or a container


def test_wrapping_twice():
    model = entprop.wrap(toy())
    with pytest.raises(AlreadyWrappedError, match="unwrap"):
        entprop.wrap(model)
    with pytest.raises(AlreadyWrappedError):
        entprop.wrap(nn.Sequential(model, nn.LayerNorm(5)))
    with pytest.raises(AlreadyWrappedError):
        entprop.wrap(model.blocks[0])
    entprop.wrap(entprop.unwrap(model))


def _compiled_in_place():
    model = toy()
    model.compile(backend="eager")
    return model


def _compiled_part():
    model = toy()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.compile(toy(), backend="eager"), r"torch\.compile\(entprop\.wrap\(model\)\)"),
        (_compiled_part, r"the part 'blocks.0' .*torch\.compile\(entprop\.wrap\(model\)\)"),
        (_compiled_in_place, "wrap, then compile"),
        (lambda: nn.DataParallel(toy()), "accelerate launch"),
        (lambda: torch.jit.trace(toy(), rows()), "after entprop.unwrap"),
    ],
    ids=["compiled", "part", "in place", "data parallel", "torchscript"],
)
def test_wrapping_what_is_in_a_container(make, message):
    model = make()
    with pytest.raises(UnsupportedModelError, match=message):
        entprop.wrap(model)
    assert _is_untouched(model)


def test_a_step_inside_an_auxiliary_block():
    part = entprop.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)))
    model = nn.Sequential(nn.Identity(), part)
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 3
    for block, step, method in ((part, part, entprop.EntProp()), (part, model, Vanilla()), (model, part, Vanilla())):
        with entprop.auxiliary(block), pytest.raises(UnsupportedModelError, match="Leave the with-block"):
            entprop.training_step(step, images, labels, method=method)
    assert int(part[1].num_batches_tracked) == 0


def test_a_static_graph_is_refused():
    from torch.distributed import HashStore, destroy_process_group, init_process_group

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = entprop.wrap(_conv_net())
        static = nn.parallel.DistributedDataParallel(model, static_graph=True)
        images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 5
        for call in (
            lambda: entprop.auxiliary(static).__enter__(),
            lambda: entprop.training_step(static, images, labels, method=entprop.EntProp()),
        ):
            with pytest.raises(UnsupportedModelError, match="Leave out static_graph=True"):
                call()
        assert int(model[1].num_batches_tracked) == 0
        assert all(parameter.grad is None for parameter in model.parameters())
        with entprop.auxiliary(nn.parallel.DistributedDataParallel(model)):
            pass
    finally:
        destroy_process_group()


class DeepSpeedEngine(nn.Module):
    """In the form of DeepSpeed's, which is known by its name: the package itself is large, and wants a GPU."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_deepspeed_is_refused():
    plain, model = _conv_net(), entprop.wrap(_conv_net())
    with pytest.raises(UnsupportedModelError, match=r"is a DeepSpeedEngine\. .* use DDP or FSDP2"):
        entprop.wrap(DeepSpeedEngine(plain))
    assert _is_untouched(plain)
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 5
    for engine in (DeepSpeedEngine(model), torch.compile(DeepSpeedEngine(model), backend="eager")):
        with pytest.raises(UnsupportedModelError, match=r"DeepSpeed steps its engine.*DDP or FSDP2.*fully_shard"):
            entprop.training_step(engine, images, labels)
    assert int(model[1].num_batches_tracked) == 0


def test_replicating_for_data_parallel():
    model = entprop.wrap(toy())
    with pytest.raises(UnsupportedModelError, match="accelerate launch"):
        model.last._replicate_for_data_parallel()


def test_unwrapping_a_part():
    model = entprop.wrap(toy())
    with pytest.raises(NotWrappedError, match="part of a wrapped model"):
        entprop.unwrap(model.blocks)
    with pytest.raises(NotWrappedError, match="part of a wrapped model"), entprop.auxiliary(model.blocks):
        pass
    entprop.unwrap(model)
    assert _is_untouched(model)


@pytest.mark.parametrize("call", [entprop.unwrap, entprop.summary, lambda m: entprop.auxiliary(m).__enter__()])
def test_what_is_not_wrapped(call):
    with pytest.raises(NotWrappedError, match="wrap"):
        call(toy())


def test_unwrapping_inside_a_block():
    model = entprop.wrap(toy())
    with entprop.auxiliary(model), pytest.raises(UnsupportedModelError, match="leave the with-block"):
        entprop.unwrap(model)
    entprop.unwrap(model)


def test_a_wrapped_part_of_a_larger_model():
    plain = nn.Sequential(toy(), nn.LayerNorm(5))
    model = nn.Sequential(entprop.wrap(copy.deepcopy(plain[0])), copy.deepcopy(plain[1]))
    perturb(model)
    assert_pass(model, plain, rows())


def test_two_wrapped_models_in_one():
    model = nn.ModuleList([entprop.wrap(toy()), entprop.wrap(toy())])
    _refuses_to_switch(model, "several wrapped models")
    before = snapshot(model)
    model[0].train()
    with entprop.auxiliary(model[0]):
        assert torch.equal(model[1](rows()), toy()(rows()))
    assert not changed(model, before)


# Norms that are not what they seem


def test_a_norm_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.again = self.norm
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.again(self.norm(x).square()))

    plain = Twice()
    model = entprop.wrap(copy.deepcopy(plain))
    perturb(model)
    assert entprop.summary(model).norms == {"BatchNorm1d": 1}
    assert_pass(model, plain, rows())
    assert model.norm.entprop_aux.num_batches_tracked == 2
    assert model.norm.num_batches_tracked == 0


def test_a_norm_in_evaluation_mode_is_so_in_every_domain():
    plain, model = toy("batch"), entprop.wrap(toy("batch"))
    perturb(model)
    for each in (plain, model):
        each.blocks[0].inner.eval()
    before = snapshot(model)
    for auxiliary in (None, "aux"):
        assert_pass(model, plain, rows(), auxiliary)
    moved = changed(model, before)
    assert not any(name.startswith("blocks.0.inner.") for name in moved)
    assert any(name.startswith("blocks.1.inner.entprop_aux.") for name in moved)


def test_norms_that_share_a_weight_go_on_sharing():
    model = toy()
    model.blocks[0].outer.weight = model.last.weight
    plain = copy.deepcopy(model)
    entprop.wrap(model, auxiliaries=("one", "two"))
    assert model.blocks[0].outer.entprop_one.weight is model.last.entprop_one.weight
    assert model.last.entprop_one.weight is not model.last.entprop_two.weight
    perturb(model)
    assert_pass(model, plain, rows(), "two")


def test_a_weight_tied_to_a_norm_that_stays_shared_is_read_there_in_every_domain():
    model = toy()
    model.blocks[0].outer.weight = model.last.weight
    plain = copy.deepcopy(model)
    entprop.wrap(model, exclude="last")
    perturb(model)
    with entprop.auxiliary(model):
        found = model(rows())
    shared = plain.last
    plain.last = nn.LayerNorm(8)
    plain.last.load_state_dict(shared.state_dict())  # its own from here on
    plain.load_state_dict(auxiliary_tensors(model), strict=False)
    torch.testing.assert_close(found, plain(rows()))


def test_a_copied_part_can_be_unwrapped():
    part = copy.deepcopy(entprop.wrap(toy()).blocks[0])
    assert _is_untouched(entprop.unwrap(part))


def test_a_norm_as_the_whole_model():
    model = entprop.wrap(nn.BatchNorm1d(8))
    with entprop.auxiliary(model):
        model(rows())
    assert (model.entprop_aux.num_batches_tracked, model.num_batches_tracked) == (1, 0)
    assert type(entprop.unwrap(model)) is nn.BatchNorm1d


def test_computing_with_an_auxiliary_copy_directly():
    model = entprop.wrap(toy())
    with pytest.raises(UnsupportedModelError, match="holds tensors only"):
        model.last.entprop_aux(rows())


# Names


@pytest.mark.parametrize(
    ("auxiliaries", "message"),
    [
        ("aux", r"write \('aux',\)"),
        ((), "at least one"),
        (("a", "a"), "twice"),
        (("a.b",), "cannot name"),
        (("my_norm",), "cannot name"),
        (("unBiased",), "cannot name"),
        ((3,), "cannot name"),
        ((["aux"],), "cannot name"),
        (5, "a tuple of names"),
    ],
)
def test_bad_names(auxiliaries, message):
    model = toy()
    with pytest.raises(AuxiliaryNameError, match=message):
        entprop.wrap(model, auxiliaries=auxiliaries)
    assert _is_untouched(model)


@pytest.mark.parametrize(
    "call",
    [
        entprop.wrap,
        entprop.unwrap,
        entprop.summary,
        entprop.main_state_dict,
        entprop.auxiliary_state_dict,
        lambda model: entprop.load_auxiliary_state_dict(model, {}),
        lambda model: entprop.parameter_groups(model, 0.1),
        lambda model: check_optimizer(model, torch.optim.SGD(toy().parameters())),
        lambda model: entprop.auxiliary(model).__enter__(),
    ],
)
def test_what_is_not_a_module(call):
    for model in (None, {}, toy):
        with pytest.raises(UnsupportedModelError, match=r"expected a torch\.nn\.Module, found"):
            call(model)


def test_arguments_of_the_wrong_kind():
    model = entprop.wrap(toy(), auxiliaries=["weak", "strong"])
    assert entprop.summary(model).auxiliaries == ("weak", "strong")
    with pytest.raises(AuxiliaryNameError, match="No auxiliary named 3"):
        entprop.auxiliary(model, 3).__enter__()
    with pytest.raises(ConfigurationError, match="record_statistics must be True or False"):
        entprop.auxiliary(model, "weak", record_statistics="no").__enter__()
    with pytest.raises(TypeError, match="expects a torch optimizer"):
        check_optimizer(model, "SGD")
    with pytest.raises(TypeError, match="expects a state dict, found int"):
        entprop.load_auxiliary_state_dict(model, 5)
    with pytest.raises(AuxiliaryNameError, match="No auxiliary named ndarray of shape"):
        entprop.auxiliary(model, np.arange(2)).__enter__()
    with pytest.raises(UnsupportedModelError, match=r"is_wrapped\(\): expected"):
        is_wrapped({})
    with pytest.raises(UnsupportedModelError, match=r"without_copies\(\): expected"):
        without_copies({}).__enter__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": np.array(2)}, r"include= holds array\(2\), which selects nothing"),
        ({"copies": np.arange(2)}, "copies must be 'all', 'affine' or 'statistics', found ndarray"),
    ],
)
def test_options_of_the_wrong_kind(options, message):
    model = toy()
    with pytest.raises(ConfigurationError, match=message):
        entprop.wrap(model, **options)
    assert not is_wrapped(model)


@pytest.mark.parametrize("value", [torch.zeros(2), 3, "meta"], ids=["shape", "no tensor", "no values"])
def test_copies_that_do_not_fit_leave_all_as_it_was(value):
    model = entprop.wrap(toy())
    before = copy.deepcopy(model.state_dict())
    state = {key: tensor + 1 for key, tensor in entprop.auxiliary_state_dict(model).items()}
    last = list(state)[-1]
    state[last] = state[last].to("meta") if isinstance(value, str) else value
    with pytest.raises(CheckpointError, match=f"{last!r} does not fit the model: expected a tensor of shape"):
        entprop.load_auxiliary_state_dict(model, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_name_that_is_taken():
    model = toy()
    model.last.entprop_aux = 3
    with pytest.raises(UnsupportedModelError, match="'last' already has an attribute named after an auxiliary"):
        entprop.wrap(model)
    assert _is_untouched(model)


def test_an_unknown_auxiliary():
    model = entprop.wrap(toy(), auxiliaries=("weak", "strong"))
    with pytest.raises(AuxiliaryNameError, match="No auxiliary named 'aux'; this model has 'weak', 'strong'"):
        entprop.auxiliary(model).__enter__()


def test_all_problems_are_reported_at_once():
    model = toy()
    for block in model.blocks:
        block.outer.forward = lambda x: x
    message = r"'blocks\.0\.outer' has a forward\(\) set on the instance.*'blocks\.1\.outer'"
    with pytest.raises(UnsupportedModelError, match=message):
        entprop.wrap(model)
    assert _is_untouched(model)


# Blocks


def test_nested_blocks_and_several_auxiliaries():
    plain = toy()
    model = entprop.wrap(copy.deepcopy(plain), auxiliaries=("weak", "strong"))
    perturb(model)
    batch = rows()
    want = {name: expected_pass(plain, batch, auxiliary_tensors(model, name)).logits for name in ("weak", "strong")}
    want[None] = expected_pass(plain, batch).logits
    with entprop.auxiliary(model, "weak"):
        assert torch.equal(model(batch), want["weak"])
        with entprop.auxiliary(model, "strong"):
            assert torch.equal(model(batch), want["strong"])
            with entprop.auxiliary(model, None):
                assert torch.equal(model(batch), want[None])
            assert torch.equal(model(batch), want["strong"])
        assert torch.equal(model(batch), want["weak"])
    assert torch.equal(model(batch), want[None])


def test_an_exception_restores_the_domain():
    model = entprop.wrap(toy("batch"))
    perturb(model)
    before = model.eval()(rows())
    with pytest.raises(ZeroDivisionError), entprop.auxiliary(model), entprop.auxiliary(model, record_statistics=False):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError), entprop.auxiliary(model):
        model(torch.randn(3, 7))
    assert torch.equal(model(rows()), before)


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ZeroDivisionError


class _FailingToy(Toy):
    fails = False

    def _blocks(self, x):
        x = super()._blocks(x)
        return _Fails.apply(x) if self.fails else x


@pytest.mark.parametrize("mode", ["none", "plain", "nested"])
def test_a_backward_that_failed_leaves_no_domain_behind(mode):
    torch.manual_seed(0)
    model = _FailingToy(mode=mode)
    plain = toy()
    entprop.wrap(model)
    perturb(model)
    switch = model._entprop_registry.switch
    batch = rows()
    model.fails = True
    with entprop.auxiliary(model):
        output = model(batch)
    with pytest.raises(ZeroDivisionError):
        loss_of(output, batch).backward()
    model.fails = False
    assert switch.pins == {}
    assert switch.thread().key is None
    assert_pass(model, plain, batch, None)


@pytest.mark.parametrize("mode", ["none", "plain", "reentrant"])
def test_a_forward_and_backward_inside_a_backward(mode):
    """A hook runs the model in another domain while a checkpointed backward is under way."""
    plain, model = toy(), entprop.wrap(toy(mode=mode))
    perturb(model)
    batch = rows().requires_grad_()
    main, aux = expected_pass(plain, batch), expected_pass(plain, batch, auxiliary_tensors(model))

    def hook(gradient):
        with torch.enable_grad():
            with entprop.auxiliary(model):
                output = model(batch)
            loss_of(output, batch).backward()  # two domains are pinned now, in one thread
        assert torch.equal(output, aux.logits)

    output = model(batch)
    output.register_hook(hook)
    loss_of(output, batch).backward()
    for name, norm, copied in model._entprop_registry.copied_parameters():
        torch.testing.assert_close(norm.grad, main.gradients[name], msg=name)
        torch.testing.assert_close(copied.grad, aux.gradients[name], msg=name)
    assert model._entprop_registry.switch.pins == {}


def test_hooks_on_a_norm_run_once_in_each_domain():
    model, calls = toy(), []
    model.last.register_forward_hook(lambda module, args, output: calls.append(module))
    model.last.register_forward_pre_hook(lambda module, args: calls.append(module))
    entprop.wrap(model)
    model(rows())
    with entprop.auxiliary(model):
        model(rows())
    assert calls == [model.last] * 4


def test_switching_class_attributes_reads_the_norm():
    class Offset(nn.LayerNorm):
        shift = 0.0
        activation = staticmethod(torch.relu)

        def forward(self, x):
            return self.activation(super().forward(x) + self.shift)

    offset = Offset(8)
    offset.activation = torch.sin
    model = entprop.wrap(nn.Sequential(offset, nn.Linear(8, 5)))
    model[0].shift = 2.0
    with entprop.auxiliary(model):
        inside = model(rows())
    assert torch.equal(inside, model(rows()))


def test_a_norm_may_assign_its_buffers():
    class Assigning(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            if self.training:
                self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
            return (x - x.mean(0)) * self.weight

    Assigning.__name__ = "AssigningNorm"
    model = entprop.wrap(nn.Sequential(Assigning(), nn.Linear(8, 5)))
    with entprop.auxiliary(model, record_statistics=False):
        model(rows())
    assert not model[0].entprop_aux.mean.any()
    with entprop.auxiliary(model):
        model(rows())
    assert not model[0].mean.any()
    assert torch.equal(model[0].entprop_aux.mean, 0.5 * rows().mean(0))


# Outputs, and functional transforms


@pytest.mark.parametrize("kind", ["dict", "tuple", "list", "namedtuple", "nested", "ModelOutput"])
def test_every_kind_of_output_is_pinned(kind):
    from collections import namedtuple

    pair = namedtuple("pair", "logits extra")

    class Wraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = toy(mode="plain")

        def forward(self, x):
            y = self.net(x)
            if kind == "ModelOutput":
                return pytest.importorskip("transformers.modeling_outputs").ImageClassifierOutput(logits=y)
            kinds = {"dict": {"logits": y}, "tuple": (y, 3), "list": [y], "namedtuple": pair(y, None)}
            return kinds.get(kind, {"all": [(y,)]})

    model = entprop.wrap(Wraps())
    perturb(model)
    with entprop.auxiliary(model):
        output = model(rows())
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    F.cross_entropy(output, torch.arange(6) % 5).backward()
    assert model.net.last.weight.grad is None
    assert model.net.blocks[0].inner.weight.grad is None
    assert model.net.blocks[0].inner.entprop_aux.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("auxiliary", [None, "aux"])
def test_per_sample_gradients_and_jacobians(auxiliary):
    from torch.func import functional_call, grad, jacrev, vmap

    model = entprop.wrap(toy())
    perturb(model)
    batch = rows()
    parameters = dict(model.named_parameters())

    def loss(parameters, row, label):
        return F.cross_entropy(functional_call(model, parameters, (row[None],)), label[None])

    labels = torch.arange(6) % 5
    with entprop.auxiliary(model, auxiliary):
        per_sample = vmap(grad(loss), (None, 0, 0))(parameters, batch, labels)
        jacobian = jacrev(model)(batch[:1])
        F.cross_entropy(model(batch), labels).backward()
    assert jacobian.shape == (1, 5, 1, 8)
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(per_sample[name].mean(0), gradient, msg=name)


def test_double_backward():
    plain = toy(mode="none").double()
    model = entprop.wrap(toy(mode="plain").double())
    perturb(model)
    tensors = auxiliary_tensors(model)

    def penalty(call):
        batch = rows().double().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(call(batch), batch), batch, create_graph=True)
        return gradient.square().sum()

    with entprop.auxiliary(model):
        penalised = penalty(model)
    penalised.backward()
    penalty(lambda batch: torch.func.functional_call(plain, tensors, (batch,))).backward()
    for name, parameter in plain.named_parameters():
        if name in tensors:
            assert model.get_parameter(name).grad is None
            owner, key = name.rsplit(".", 1)
            torch.testing.assert_close(model.get_parameter(f"{owner}.entprop_aux.{key}").grad, tensors[name].grad)
        else:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


# What is left of a model


def test_summary():
    model = toy("batch")
    parameters = sum(p.numel() for p in model.parameters())
    found = entprop.summary(entprop.wrap(model, auxiliaries=("a", "b")))
    assert (found.norms, found.auxiliaries) == ({"LayerNorm": 3, "BatchNorm1d": 2}, ("a", "b"))
    assert (found.parameters, found.added) == (parameters, 2 * 5 * 16)
    assert str(found).startswith("Toy: 5 norm layers (3 LayerNorm, 2 BatchNorm1d), +160 parameters in a, b (")


def test_copies_inherit_what_the_norms_are():
    model = toy("batch").to(torch.float64)
    model.last.requires_grad_(False)
    model.last.register_buffer("scratch", torch.zeros(8), persistent=False)
    entprop.wrap(model)
    copy_ = model.last.entprop_aux
    assert copy_.scratch is not model.last.scratch
    assert not any("scratch" in key for key in model.state_dict())
    assert copy_.weight.dtype == torch.float64
    assert not copy_.weight.requires_grad
    assert model.blocks[0].inner.entprop_aux.weight.requires_grad
    assert torch.equal(copy_.weight, model.last.weight)
    assert copy_.weight.data_ptr() != model.last.weight.data_ptr()


def test_meta_device():
    with torch.device("meta"):
        model = entprop.wrap(toy("batch"))
        with entprop.auxiliary(model):
            assert model(torch.empty(2, 8)).shape == (2, 5)
    model.to_empty(device="cpu")
    assert model.last.entprop_aux.weight.device.type == "cpu"


def test_a_wrapped_model_is_collected_with_its_registry():
    model = entprop.wrap(toy())
    registry, norm = weakref.ref(model._entprop_registry), weakref.ref(model.last)
    del model
    gc.collect()
    assert registry() is None
    assert norm() is None
