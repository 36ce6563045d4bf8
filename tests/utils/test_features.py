"""What a classifier's head is given, on real architectures and in every kind of head and container."""

import pytest
import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError, ModelOutputError, UnsupportedModelError
from entprop_wrap.utils.features import features_of
from tests.helpers.architectures import ARCHITECTURES, CLASSES, logits_of
from tests.helpers.diagnosed import images, make


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_the_head_of_real_architectures_makes_the_logits_of_the_features(architecture):
    model = entprop.wrap(architecture.build()).eval()
    batch = architecture.images(3)
    with torch.no_grad(), features_of(model) as features:
        expected = logits_of(model(batch))
        main = features.last
        with entprop.auxiliary(model):
            model(batch)
    head = model.get_submodule(features.layer)
    assert main.ndim == 2
    rows = head(main[..., None, None]).flatten(1) if isinstance(head, nn.Conv2d) else head(main)
    torch.testing.assert_close(rows, expected)
    assert features.last.shape == main.shape


def test_features_are_differentiable():
    model, batch = make("bn"), images(4).requires_grad_()
    with features_of(model) as features:
        logits = model(batch)
    expected = torch.autograd.grad((model.fc(features.last) * logits.detach()).sum(), batch, retain_graph=True)[0]
    found = torch.autograd.grad((logits * logits.detach()).sum(), batch)[0]
    torch.testing.assert_close(found, expected)
    assert features.layer == "fc"


class Head(nn.Module):
    """Backbone and a head of one's own."""

    def __init__(self, head, after=lambda logits: logits):
        super().__init__()
        self.body, self.head, self.after = nn.Conv2d(3, 6, 3), head, after

    def forward(self, pixels):
        return self.after(self.head(self.body(pixels)))


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, as peft has it."""

    def __init__(self):
        super().__init__()
        self.base_layer, self.a, self.b = nn.Linear(6, CLASSES), nn.Linear(6, 2), nn.Linear(2, CLASSES)

    def forward(self, given):
        return self.base_layer(given) + self.b(self.a(given))


class Cosine(nn.Module):
    """Weights of its own, and no linear layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, 6))

    def forward(self, given):
        return nn.functional.normalize(given) @ nn.functional.normalize(self.weight).T


def pool():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Tokens(nn.Module):
    """(N, C, T) to (N, T, C)."""

    def forward(self, given):
        return given.mT


def linear(after=lambda logits: logits):
    return Head(nn.Sequential(pool(), nn.Linear(6, CLASSES)), after)


def mean_of_tokens():
    return Head(nn.Sequential(nn.Flatten(2), Tokens(), nn.Linear(6, CLASSES)), lambda z: z.mean(1))


#: The model, the layer whose input are the features, their number.
HEADS = {
    "linear": (linear, "head.1", 6),
    "convolution and pool": (lambda: Head(nn.Sequential(nn.Conv2d(6, CLASSES, 1), pool())), "head", 6),
    "convolution, then a pool outside": (lambda: Head(nn.Conv2d(6, CLASSES, 1), lambda z: z.mean((2, 3))), "head", 6),
    "an activation in place": (lambda: Head(nn.Sequential(*linear().head, nn.ReLU(inplace=True))), "head.1", 6),
    "pool and convolution": (lambda: Head(nn.Sequential(pool()[0], nn.Conv2d(6, CLASSES, 1), pool()[1])), "head.1", 6),
    "logits are cast": (lambda: linear(lambda z: z.double()), "head.1", 6),
    "adapter": (lambda: Head(nn.Sequential(pool(), Adapted())), "head.1", 6),
    "adapter and cast": (lambda: Head(nn.Sequential(pool(), Adapted()), lambda z: z.double()), "head.1", 6),
    "module of one's own": (lambda: Head(nn.Sequential(pool(), Cosine())), "head.1", 6),
    "as many features as classes": (
        lambda: Head(nn.Sequential(*linear().head, nn.Linear(CLASSES, CLASSES))), "head.2", CLASSES
    ),
    "dictionary": (lambda: linear(lambda z: {"logits": z}), "head.1", 6),
    "mean over tokens": (mean_of_tokens, "head.2", 6),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("gradients", [True, False])
def test_heads_of_all_kinds_are_found(kind, gradients):
    build, layer, width = HEADS[kind]
    model = build()
    with torch.set_grad_enabled(gradients), features_of(model) as features:
        model(images(3, dtype=torch.float32))
    assert features.layer == layer
    assert features.last.shape == (3, width)


def test_another_layer_can_be_chosen():
    model, batch = make("ln"), images(3)
    with features_of(model, layer="before_mlp") as features:
        model(batch)
    seen = []
    handle = model.before_mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(batch)
    handle.remove()
    torch.testing.assert_close(features.last, seen[0].mean(1))
    with features_of(make("bn"), layer="bn2") as features, pytest.raises(ConfigurationError, match="No pass"):
        _ = features.last


def test_a_compiled_model_runs_eagerly():
    model = make("bn", wrapped=False)
    compiled = torch.compile(model, backend="eager")
    batch = images(3)
    compiled(batch)
    for called in (compiled, model):
        with features_of(compiled) as features:
            logits = called(batch)
        torch.testing.assert_close(model.fc(features.last), logits)


def test_a_checkpointed_block_that_runs_again_changes_nothing():
    model = linear()
    inner = model.head.forward
    model.head.forward = lambda z: torch.utils.checkpoint.checkpoint(inner, z, use_reentrant=False)
    with features_of(model) as features:
        logits = model(images(3, dtype=torch.float32))
        before = features.last
        logits.sum().backward()
        assert features.last is before


def test_hooks_are_gone_after_an_error():
    model = make("bn")
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    with pytest.raises(RuntimeError), features_of(model):
        model(images(3)[:, :1])
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.weight = nn.Conv2d(3, 6, 3), nn.Parameter(torch.randn(CLASSES, 6))

    def forward(self, pixels):
        return self.conv(pixels).mean((2, 3)) @ self.weight.T


def test_a_model_without_a_head_says_so():
    with pytest.raises(ModelOutputError, match="layer='name'"), features_of(model := Functional()):
        model(images(3, dtype=torch.float32))


@pytest.mark.parametrize("layer", ["", "fcc", "nothing"])
def test_an_unknown_layer_is_refused(layer):
    with pytest.raises(ConfigurationError, match="no layer"), features_of(make("bn"), layer=layer):
        pass


def test_a_layer_that_runs_twice_or_gives_no_rows_is_refused():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 3), shared, pool(), nn.Linear(4, CLASSES))
    with pytest.raises(ModelOutputError, match="2 times"), features_of(model, layer="1"):
        model(images(3, dtype=torch.float32))
    folded = nn.Sequential(nn.Flatten(0, 1), nn.Flatten(), nn.Linear(64, CLASSES), nn.Unflatten(0, (3, 3)), Mean())
    with pytest.raises(ModelOutputError, match="9, 64"), features_of(folded, layer="2"):
        folded(images(3, dtype=torch.float32))
    with pytest.raises(UnsupportedModelError, match="Module"), features_of("resnet50"):
        pass


class Mean(nn.Module):
    def forward(self, given):
        return given.mean(1)
