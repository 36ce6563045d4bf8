"""``torch.compile`` and activation checkpointing, each alone and together, against the oracle."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import entprop_wrap as entprop
from tests.helpers.norm_nets import rows, toy
from tests.helpers.oracle import assert_same, auxiliary_tensors, expected_pass, loss_of, observed_pass, perturb
from tests.helpers.versions import RECENT_TORCH, needs_recent_torch

MODES = ["plain", "reentrant", "nested"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def _pair(norm="batch", mode="none", dtype=torch.float64, depth=2):
    plain = toy(norm, depth=depth).to(dtype)
    model = entprop.wrap(toy(norm, mode, depth=depth).to(dtype))
    perturb(model)
    return plain, model


def _expected(plain, model, batch):
    """Return what each domain must give, from the model's state now."""
    return {None: expected_pass(plain, batch), "aux": expected_pass(plain, batch, auxiliary_tensors(model))}


def _check(model, output, expected, auxiliary, tolerance=1e-9):
    found = observed_pass(model, output, auxiliary)
    found.buffers, wanted = {}, copy.copy(expected[auxiliary])
    wanted.buffers = {}  # a recomputation records statistics twice, in any model
    assert_same(found, wanted, tolerance)
    for _, norm, copied in model._entprop_registry.copied_parameters():
        idle = copied if auxiliary is None else norm
        assert idle.grad is None or not idle.grad.any()


# Checkpointing


def test_functional_call_is_silently_wrong_here():
    """Why the switch is not made of it: a recomputation reads the model's own tensors again."""
    found = {}
    for mode in ("none", "plain"):
        plain = toy("layer", mode)
        tensors = {name: 2 * value.detach() for name, value in plain.named_parameters() if "outer" in name}
        loss_of(torch.func.functional_call(plain, tensors, (rows(),)), rows()).backward()
        found[mode] = plain.stem.weight.grad
    assert not torch.allclose(found["plain"], found["none"], rtol=0.01)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("mode", MODES)
def test_backward_inside_the_block_after_it_or_inside_another(mode, norm):
    plain, model = _pair(norm, mode)
    batch = rows().double().requires_grad_()
    expected = _expected(plain, model, batch)
    for auxiliary, around in (("aux", "aux"), (None, None), ("aux", None), (None, "aux")):
        state = copy.deepcopy(model.state_dict())
        model.zero_grad()
        with entprop.auxiliary(model, auxiliary):
            output = model(batch)
            if auxiliary == around:
                loss_of(output, batch).backward()
        if auxiliary != around:
            with entprop.auxiliary(model, around):
                loss_of(output, batch).backward()
        _check(model, output, expected, auxiliary)
        model.load_state_dict(state)
    assert model._entprop_registry.switch.pins == {}


@pytest.mark.parametrize("auxiliary_first", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_one_backward_of_both_domains(mode, auxiliary_first):
    plain, model = _pair("layer", mode)
    batch = rows().double().requires_grad_()
    expected = _expected(plain, model, batch)
    outputs = {}
    for auxiliary in ("aux", None) if auxiliary_first else (None, "aux"):
        with entprop.auxiliary(model, auxiliary):
            outputs[auxiliary] = model(batch)
    sum(loss_of(output, batch) for output in outputs.values()).backward()
    for name, norm, copied in model._entprop_registry.copied_parameters():
        torch.testing.assert_close(norm.grad, expected[None].gradients[name], msg=name)
        torch.testing.assert_close(copied.grad, expected["aux"].gradients[name], msg=name)
    both = expected[None].gradients["head.weight"] + expected["aux"].gradients["head.weight"]
    torch.testing.assert_close(model.head.weight.grad, both)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_of_recomputed_passes_go_to_their_own_domain(mode):
    _, model = _pair("batch", mode)
    batch = rows().double().requires_grad_()
    with entprop.auxiliary(model):
        loss = loss_of(model(batch), batch)
    loss.backward()
    for block in model.blocks:
        assert block.inner.num_batches_tracked == 0
        assert block.inner.entprop_aux.num_batches_tracked >= 2  # recorded again as in any model
    with entprop.auxiliary(model, record_statistics=False):
        loss = loss_of(model(batch), batch)
    before = copy.deepcopy(model.state_dict())
    loss.backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Compilation


@pytest.mark.parametrize(("norm", "mode"), [("batch", "none"), ("batch", "plain"), ("layer", "none")])
def test_one_graph_per_domain_at_fullgraph(norm, mode):
    if (norm, mode) == ("batch", "plain") and not RECENT_TORCH:
        pytest.skip("torch 2.6 records batch statistics twice under a compiled checkpoint")
    plain, model = _pair(norm, mode, depth=1)
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    batch = rows().double()
    for auxiliary in (None, "aux", None):
        expected = _expected(plain, model, batch)
        state = copy.deepcopy(model.state_dict())
        model.zero_grad()
        with entprop.auxiliary(compiled, auxiliary):
            output = compiled(batch)
        loss_of(output, batch).backward()
        found = observed_pass(model, output, auxiliary)
        assert_same(found, expected[auxiliary], 1e-9)
        model.load_state_dict(state)
    assert len(graphs) == 2


def test_a_loop_that_also_evaluates_has_a_graph_for_each_domain_and_mode_and_stays_below_the_limit():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(entprop.wrap(nn.Sequential(nn.BatchNorm1d(8))), backend=backend)
    for images, selected in ((8, 4), (8, 4), (6, 3)):  # the last batch is smaller
        for auxiliary, recording, number in ((None, True, images), ("aux", False, selected), ("aux", True, selected)):
            with entprop.auxiliary(compiled.train(), auxiliary, record_statistics=recording):
                compiled(rows(number))
    assert 3 <= len(graphs) < 8  # dynamo's limit
    for images in (8, 5):
        compiled.eval()(rows(images))
    assert 4 <= len(graphs) < 8
    before = len(graphs)
    compiled.train()(rows(7))
    compiled.eval()(rows(7))
    assert len(graphs) == before


@pytest.mark.parametrize("mode", ["plain", "reentrant"])
def test_compiled_checkpointed_and_autocast_together(mode):
    """Compile x checkpointing x bf16: the compiled model gives what the eager one gives."""
    _, model = _pair("batch", "plain", torch.float32, depth=1)
    twin = copy.deepcopy(model)
    twin.mode = mode
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=mode == "plain")
    batch = rows()
    for auxiliary in (None, "aux", None):
        gradients = []
        for net, call in ((model, model), (twin, compiled)):
            net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16), entprop.auxiliary(call, auxiliary):
                loss = loss_of(call(batch), batch)
                if mode == "reentrant":  # torch leaves the recomputation to eager code: backward inside the block
                    loss.backward()
            if mode == "plain":
                loss.backward()
            gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=0.05, atol=0.01, msg=name)


@pytest.mark.parametrize(("norm", "reentrant"), [("batch", False), ("layer", True)])
def test_compiled_blocks_inside_eager_checkpoints(norm, reentrant):
    """Each block compiled, checkpointed in eager code, and the backward after the with-block."""

    class Outer(nn.Module):
        def __init__(self, net, checkpointed=True):
            super().__init__()
            self.checkpointed = checkpointed
            self.net = net
            self.run = list(net.blocks)

        def forward(self, batch):
            x = self.net.stem(batch)
            for run in self.run:
                x = checkpoint(run, x, use_reentrant=reentrant) if self.checkpointed else run(x)
            return self.net.head(self.net.last(x))

    plain, model = Outer(toy(norm).double(), False), entprop.wrap(Outer(toy(norm).double()))
    perturb(model)
    model.run = [torch.compile(block, backend="aot_eager") for block in model.net.blocks]
    batch = rows().double().requires_grad_()
    expected = _expected(plain, model, batch)
    for auxiliary, around in (("aux", "aux"), ("aux", None), (None, "aux"), ("aux", None), (None, None)):
        state = copy.deepcopy(model.state_dict())
        model.zero_grad()
        with entprop.auxiliary(model, auxiliary):
            output = model(batch)
        with entprop.auxiliary(model, around):
            loss_of(output, batch).backward()
        _check(model, output, expected, auxiliary)
        model.load_state_dict(state)


@needs_recent_torch
def test_inductor():
    plain, model = _pair("batch", "plain", torch.float32, depth=1)
    compiled = torch.compile(model, fullgraph=True)
    batch = rows()
    for auxiliary in (None, "aux"):
        expected = _expected(plain, model, batch)
        state = copy.deepcopy(model.state_dict())
        model.zero_grad()
        with entprop.auxiliary(compiled, auxiliary):
            output = compiled(batch)
        loss_of(output, batch).backward()
        assert_same(observed_pass(model, output, auxiliary), expected[auxiliary], 1e-5)
        model.load_state_dict(state)


def test_autocast_casts_each_copy():
    plain, model = _pair("layer", dtype=torch.float32)
    tensors = auxiliary_tensors(model)
    batch = rows()
    with torch.autocast("cpu", torch.bfloat16):  # one context, whose cache of cast weights serves both passes
        loss_of(model(batch), batch).backward()
        with entprop.auxiliary(model):
            output = model(batch)
            wanted = torch.func.functional_call(plain, tensors, (batch,))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, wanted)
