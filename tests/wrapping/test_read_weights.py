"""Models that read the weights of their norms without running these: torch's fast path, fused kernels."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import entprop_wrap as entprop
from entprop_wrap.errors import UnsupportedModelError
from tests.helpers.norm_nets import rows, toy
from tests.helpers.oracle import auxiliary_tensors, changed, loss_of, perturb, snapshot


class Encoder(nn.Module):
    """Tokens to classes, through torch's own encoder."""

    def __init__(self, kind):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = layer if kind == "layer" else nn.TransformerEncoder(layer, 2)
        self.padded = kind == "padded"
        self.head = nn.Linear(8, 5)

    def forward(self, tokens):
        padding = torch.arange(4)[None] >= torch.tensor([4, 2, 3, 4, 1, 4])[:, None]
        options = {"src_key_padding_mask": padding} if self.padded else {}
        return self.head(self.encoder(tokens, **options).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["layer", "encoder", "padded"])
def test_the_fast_path_of_torch_is_switched_too(kind):
    torch.manual_seed(0)
    plain = Encoder(kind).eval()
    model = entprop.wrap(copy.deepcopy(plain))
    perturb(model)
    twin, tokens = copy.deepcopy(model), torch.randn(6, 4, 8)
    oracle = copy.deepcopy(plain)
    oracle.load_state_dict(auxiliary_tensors(model), strict=False)
    with torch.no_grad():
        for each in (model, twin):
            torch.testing.assert_close(each(tokens), plain(tokens))
            with entprop.auxiliary(each):
                torch.testing.assert_close(each(tokens), oracle(tokens))
            assert not torch.allclose(oracle(tokens), plain(tokens), atol=1e-3)
    entprop.unwrap(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(tokens), plain(tokens))


class Fused(nn.Module):
    """The last norm is never called."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.toy, self.checkpointed = toy("batch"), checkpointed
        self.norm = nn.LayerNorm(5)
        self.unused = nn.LayerNorm(5)

    def _fused(self, x):
        return F.layer_norm(x, (5,), self.norm.weight, self.norm.bias)

    def forward(self, rows):
        x = self.toy(rows)
        return {"logits": checkpoint(self._fused, x, use_reentrant=False) if self.checkpointed else self._fused(x)}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("auxiliary", [None, "aux"])
def test_a_norm_that_is_read_and_not_run_raises(auxiliary, checkpointed, monkeypatch):
    monkeypatch.setattr(torch._dynamo.utils, "counters", {"frames": {}})
    model = entprop.wrap(Fused(checkpointed))
    for _ in range(2):  # and not only once
        with (
            pytest.raises(UnsupportedModelError, match=r"weights of 1 norm layers.*exclude=\['norm'\]"),
            entprop.auxiliary(model, auxiliary),
        ):
            model(rows())
    model = entprop.wrap(entprop.unwrap(model), exclude=["norm"])
    with entprop.auxiliary(model, auxiliary):
        loss_of(model(rows())["logits"], rows()).backward()
    assert model._entprop_registry.switch.ran is None
    assert (model.toy.last.entprop_aux.weight.grad is not None) == (auxiliary == "aux")


class Both(Fused):
    """The last norm is called, and its weight is read as well."""

    def forward(self, rows):
        x = self.toy(rows)
        return self.norm(x) + self._fused(x)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("net", [Fused, Both])
def test_the_auxiliary_pass_may_not_reach_weights_of_the_main_domain(net, compiled):
    model = entprop.wrap(net())
    if compiled:
        model._fused = torch.compile(model._fused, backend="aot_eager")
    if net is Both or compiled:
        model(rows())  # the main domain is right
        model._entprop_registry.switch.ran = None
    for record_statistics in (True, False):
        with (
            pytest.raises(UnsupportedModelError, match=r"weights of 1 norm layers.*'norm'"),
            entprop.auxiliary(model, record_statistics=record_statistics),
        ):
            model(rows())
    model = entprop.wrap(entprop.unwrap(model), exclude=["norm"])
    with entprop.auxiliary(model):
        model(rows())
    assert not model._entprop_registry.unchecked


@pytest.mark.parametrize("copies", ["affine", "statistics"])
def test_what_the_domains_share_may_be_read(copies):
    model = entprop.wrap(Both(), copies=copies)
    with entprop.auxiliary(model):
        if copies == "statistics":
            model(rows())
        else:
            with pytest.raises(UnsupportedModelError, match="weights of 1 norm layers"):
                model(rows())


def test_a_step_that_finds_it_has_not_happened(monkeypatch):
    monkeypatch.setattr(torch._dynamo.utils, "counters", {"frames": {}})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.bn, self.net = nn.Conv2d(3, 8, 2, stride=2), nn.BatchNorm2d(8), Fused()

        def forward(self, images):
            return self.net(self.bn(self.stem(images)).mean((2, 3)))["logits"]

    model = entprop.wrap(Net())
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="reads the weights"):
        entprop.training_step(model, torch.rand(8, 3, 4, 4), torch.arange(8) % 5)
    assert not changed(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_norms_that_a_pass_leaves_out_are_no_problem(monkeypatch):
    monkeypatch.setattr(torch._dynamo.utils, "counters", {"frames": {}})

    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.toy, self.sometimes, self.on = toy(), nn.LayerNorm(5, bias=False), False

        def forward(self, rows):
            x = self.toy(rows)
            return self.sometimes(x) if self.on else x

    model = entprop.wrap(Depth())
    perturb(model)
    with torch.no_grad():
        model(rows())
    assert model._entprop_registry.switch.ran is not None  # only a pass with gradients can tell
    model(rows())
    assert model._entprop_registry.switch.ran is None
    model.on = True
    with entprop.auxiliary(model):
        loss_of(model(rows()), rows()).backward()
    assert model.sometimes.weight.grad is None
    assert model.sometimes.entprop_aux.weight.grad is not None


def test_what_went_before_the_model_is_not_looked_at(monkeypatch):
    """Inputs may have a graph of their own, in which another part of the model has run."""
    monkeypatch.setattr(torch._dynamo.utils, "counters", {"frames": {}})

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, x):
            return self.last(x)

    model = entprop.wrap(Part())
    x = F.layer_norm(rows(), (8,), model.first.weight, model.first.bias)
    model(x=x).sum().backward()
    assert model._entprop_registry.switch.ran is None


def test_norms_in_compiled_parts_are_taken_to_run():
    model = entprop.wrap(toy())
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    with entprop.auxiliary(model):
        loss_of(model(rows()), rows()).backward()
    assert "torch._dynamo" in sys.modules
    assert model.blocks[0]._orig_mod.inner.entprop_aux.weight.grad is not None
