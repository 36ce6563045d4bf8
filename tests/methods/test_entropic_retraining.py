"""Our entropic retraining against a naive float64 reference, and what it refuses."""

import inspect

import pytest
import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError, ModelOutputError, UnsupportedModelError
from entprop_wrap.methods.entropic_retraining import EntropicRetraining, activation_entropy, channel_dimension
from tests.methods.covering import covering, name_of
from tests.methods.loops import Checkpointed, wrapped
from tests.methods.parity import BATCH, Pair, assert_matches, run
from tests.reference import entropic_retraining as reference
from tests.reference.models import MODELS, build, random_batch

LAYERS = {  # norm layers of the toys, and whether their channels come last
    "batch_norm": {"bn1": False, "bn2": False},
    "layer_norm": {"before_attention": True, "before_mlp": True, "last": True},
    "group_norm": {"gn1": False, "gn2": False},
    "mixed_norms": {"bn1": False, "block.norm": True, "block.bn": False, "bn2": False, "head.0": False},
}
TABLE = {
    "kind": tuple(MODELS),
    "activation_weight": (0.0, 0.7, -0.5),
    "output_weight": (0.0, 0.4, -0.3),
    "layers": ("*", "*b*n*"),
    "soft": (False, True),
}


def possible(row):
    weights = bool(row["activation_weight"] or row["output_weight"])
    return weights and (row["layers"] == "*" or row["kind"] in ("batch_norm", "mixed_norms"))


@pytest.mark.parametrize("case", covering(TABLE, possible), ids=name_of)
def test_entropic_retraining(case):
    pair = Pair(case["kind"])
    images, labels = random_batch(BATCH, soft=case["soft"])
    options = {name: case[name] for name in ("activation_weight", "output_weight")}
    out = run(pair, (images, labels), EntropicRetraining(layers=case["layers"], **options))
    layers = LAYERS[case["kind"]]
    if case["layers"] != "*":
        layers = {name: last for name, last in layers.items() if "b" in name.split("n")[0]}
        assert len(layers) >= 2
    expected = reference.step(pair.plain, pair.main, pair.auxiliary, images, labels, layers=layers, **options)
    assert_matches(pair, out, expected)


def test_activation_entropy_by_hand():
    even, lone = torch.ones(1, 4, 3, 3), torch.zeros(1, 4, 3, 3)
    lone[:, 2] = 5.0
    half = lone.clone()
    half[:, 0] = -5.0
    values = activation_entropy(torch.cat([even, lone, half, 1000 * half]))
    torch.testing.assert_close(values, torch.tensor([1.0, 0.0, 0.5, 0.5]), atol=1e-5, rtol=0)
    tokens = torch.rand(2, 7, 4)
    torch.testing.assert_close(
        activation_entropy(tokens, channels=2), activation_entropy(tokens.movedim(2, 1).contiguous(), channels=1)
    )
    dead = torch.zeros(2, 4, 3, 3, requires_grad=True)
    activation_entropy(dead).sum().backward()
    assert dead.grad.isfinite().all()
    with pytest.raises(ModelOutputError, match="2 channels"):
        activation_entropy(torch.rand(3, 1, 2, 2))


def test_where_channels_are():
    class LayerNorm2d(nn.LayerNorm):
        pass

    class Odd(nn.LayerNorm):
        pass

    square = torch.rand(2, 4, 4, 4)
    assert channel_dimension(nn.BatchNorm1d(4), torch.rand(2, 4, 4)) == 1
    assert channel_dimension(nn.GroupNorm(1, 4), square) == 1
    assert channel_dimension(nn.LayerNorm(4), square) == 3
    assert channel_dimension(nn.LayerNorm(4), torch.rand(2, 4, 4)) == 2
    assert channel_dimension(nn.LayerNorm(4), torch.rand(2, 4)) == 1
    assert channel_dimension(LayerNorm2d(4), square) == 1
    assert channel_dimension(Odd(4), torch.rand(2, 4, 3, 3)) == 1
    for norm in (Odd(4), nn.LayerNorm((4, 4, 4))):
        with pytest.raises(ModelOutputError, match="Cannot tell the channels"):
            channel_dimension(norm, square)
    recording = Odd(4)
    recording.register_buffer("running_mean", torch.zeros(4))
    assert channel_dimension(recording, square) == 1
    assert channel_dimension(recording, torch.rand(2, 3, 3, 4)) == 3


def test_hooks_are_gone_after_the_step_and_after_an_error():
    def clean(model):
        hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
        return not any(inspect.isfunction(hook) for hook in hooks)

    for model in (build("batch_norm"), wrapped("layer_norm")):
        entprop.training_step(model, *random_batch(6), method=EntropicRetraining())
        assert clean(model)
    model = build("batch_norm")
    model.fc.register_forward_pre_hook(_refuse)
    with pytest.raises(RuntimeError, match="no"):
        entprop.training_step(model, *random_batch(6), method=EntropicRetraining())
    assert clean(model)


def _refuse(module, args):
    raise RuntimeError("no")


@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm"])
def test_checkpointing(kind):
    batch, found = random_batch(8), []
    for model in (build(kind), Checkpointed(build(kind), False)):
        entprop.training_step(model, *batch, method=EntropicRetraining(1.0, 1.0))
        found.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-12, atol=1e-14)
    model = Checkpointed(build(kind), True)
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        entprop.training_step(model, *batch, method=EntropicRetraining())
    assert all(map(torch.equal, before, model.buffers()))
    assert not any(module._forward_hooks for module in model.modules())


def test_activations_in_place():
    class InPlace(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.net = build("batch_norm")
            self.relu = nn.ReLU(inplace)

        def forward(self, pixels):
            hidden = self.relu(self.net.bn1(self.net.conv1(pixels)))
            return self.net.fc(self.relu(self.net.bn2(self.net.conv2(hidden))).mean((2, 3)))

    found = []
    for inplace in (False, True):
        model = InPlace(inplace)
        entprop.training_step(model, *random_batch(8), method=EntropicRetraining(1.0, 1.0))
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_compiled_models_are_refused():
    model = torch.compile(build("batch_norm"), backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"compile=False"):
        entprop.training_step(model, *random_batch(6), method=EntropicRetraining())


def test_layers_that_cannot_be_steered():
    model = build("batch_norm")
    with pytest.raises(ConfigurationError, match="matches none of the 2 norm layers of the model, such as 'bn1'"):
        entprop.training_step(model, *random_batch(6), method=EntropicRetraining(layers="layer4.*"))
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="anything trainable"):
        entprop.training_step(model, *random_batch(6), method=EntropicRetraining(layers="bn1"))
    entprop.training_step(model, *random_batch(6), method=EntropicRetraining())
    assert model.bn2.weight.grad is not None


@pytest.mark.parametrize(
    "options",
    [
        {"activation_weight": 0, "output_weight": 0.0},
        {"activation_weight": float("inf")},
        {"output_weight": None},
        {"layers": ""},
        {"layers": ("bn1",)},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        EntropicRetraining(**options)
