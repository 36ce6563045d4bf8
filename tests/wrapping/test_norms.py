"""Every norm class of the census, alone in a tiny net; what is left out, what ``include`` and ``exclude`` change."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError, NoNormLayersError, UnsupportedModelError
from entprop_wrap.wrapping.norm_layers import find_norms, is_norm
from entprop_wrap.wrapping.switched_norm import SwitchedNorm
from tests.helpers.oracle import (
    assert_pass,
    auxiliary_tensors,
    changed,
    expected_pass,
    loss_of,
    perturb,
    snapshot,
)

WIDTH = 8


def _timm(path):
    def make(*args, **options):
        module, name = path.rsplit(".", 1)
        return getattr(pytest.importorskip(f"timm.{module}"), name)(*args, **options)

    return make


def _hf(model, name):
    def make(*args, **options):
        return getattr(pytest.importorskip(f"transformers.models.{model}.modeling_{model}"), name)(*args, **options)

    return make


def _bit():
    config = pytest.importorskip("transformers").BitConfig(num_groups=2)
    return _hf("bit", "BitGroupNormActivation")(config, WIDTH)


def _tv_layer_norm_2d():
    return pytest.importorskip("torchvision").models.convnext.LayerNorm2d(WIDTH)


# One entry per class: where it sits (images NCHW, or tokens N x T x C), and how it is built.
CENSUS = {
    "torch.BatchNorm2d": ("images", lambda: nn.BatchNorm2d(WIDTH)),
    "torch.BatchNorm1d": ("rows", lambda: nn.BatchNorm1d(WIDTH)),
    "torch.LayerNorm": ("tokens", lambda: nn.LayerNorm(WIDTH)),
    "torch.GroupNorm": ("images", lambda: nn.GroupNorm(2, WIDTH)),
    "timm.BatchNormAct2d": ("images", lambda: _timm("layers.BatchNormAct2d")(WIDTH)),
    "timm.LayerNorm": ("tokens", lambda: _timm("layers.LayerNorm")(WIDTH)),
    "timm.LayerNorm2d": ("images", lambda: _timm("layers.LayerNorm2d")(WIDTH)),
    "timm.GroupNorm": ("images", lambda: _timm("layers.GroupNorm")(WIDTH, num_groups=2)),
    "timm.GroupNorm1": ("images", lambda: _timm("layers.GroupNorm1")(WIDTH)),
    "timm.RmsNorm": ("tokens", lambda: _timm("layers.RmsNorm")(WIDTH)),
    "timm.RmsNorm2d": ("images", lambda: _timm("layers.RmsNorm2d")(WIDTH)),
    "timm.RmsNormFp32": ("tokens", lambda: _timm("layers.norm.RmsNormFp32")(WIDTH)),
    "timm.RmsNormAct2d": ("images", lambda: _timm("layers.norm_act.RmsNormAct2d")(WIDTH)),
    "timm.GroupNormAct": ("images", lambda: _timm("layers.GroupNormAct")(WIDTH, num_groups=2)),
    "timm.LayerNormAct2d": ("images", lambda: _timm("layers.LayerNormAct2d")(WIDTH)),
    "timm.SimpleNorm2d": ("images", lambda: _timm("layers.SimpleNorm2d")(WIDTH)),
    "timm.EvoNorm2dS0": ("images", lambda: _timm("layers.EvoNorm2dS0")(WIDTH, groups=2)),
    "timm.EvoNorm2dS0a": ("images", lambda: _timm("layers.EvoNorm2dS0a")(WIDTH, groups=2)),
    "timm.FilterResponseNormTlu2d": ("images", lambda: _timm("layers.FilterResponseNormTlu2d")(WIDTH)),
    "timm.LayerNorm2dNoBias": ("images", lambda: _timm("models.metaformer.LayerNorm2dNoBias")(WIDTH)),
    "timm.GroupNorm1NoBias": ("images", lambda: _timm("models.metaformer.GroupNorm1NoBias")(WIDTH)),
    "timm.LayerNormNoBias": ("tokens", lambda: _timm("models.metaformer.LayerNormNoBias")(WIDTH)),
    "torchvision.LayerNorm2d": ("images", _tv_layer_norm_2d),
    "transformers.BitGroupNormActivation": ("images", _bit),
    "transformers.ConvNextLayerNorm": (
        "images",
        lambda: _hf("convnext", "ConvNextLayerNorm")(WIDTH, data_format="channels_first"),
    ),
    "transformers.ConvNextV2LayerNorm": (
        "images",
        lambda: _hf("convnextv2", "ConvNextV2LayerNorm")(WIDTH, data_format="channels_first"),
    ),
    "transformers.ImageGPTLayerNorm": ("tokens", lambda: _hf("imagegpt", "ImageGPTLayerNorm")((WIDTH,))),
    "transformers.PoolFormerGroupNorm": ("images", lambda: _hf("poolformer", "PoolFormerGroupNorm")(WIDTH)),
    "transformers.Gemma3RMSNorm": ("tokens", lambda: _hf("gemma3", "Gemma3RMSNorm")(WIDTH)),
}


class ABN(nn.Module):
    """A batch norm as those who write their own have it, mapillary's InPlaceABN among them."""

    def __init__(self, affine, before=None):
        super().__init__()
        self.before = before or nn.Identity()
        self.weight = nn.Parameter(torch.ones(WIDTH)) if affine else None
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("running_var", torch.ones(WIDTH))

    def forward(self, x):
        mean, variance = self.running_mean, self.running_var
        return nn.functional.batch_norm(self.before(x), mean, variance, self.weight, training=self.training)


# Not met in the census, and yet of the same families.
RELATIVES = {
    "torch.BatchNorm3d": ("volumes", lambda: nn.BatchNorm3d(WIDTH)),
    "torch.BatchNorm2d, cumulative average": ("images", lambda: nn.BatchNorm2d(WIDTH, momentum=None)),
    "torch.BatchNorm2d, without affine": ("images", lambda: nn.BatchNorm2d(WIDTH, affine=False)),
    "torch.BatchNorm2d, without statistics": ("images", lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False)),
    "torch.InstanceNorm2d": ("images", lambda: nn.InstanceNorm2d(WIDTH, affine=True)),
    "torch.InstanceNorm2d, tracking": ("images", lambda: nn.InstanceNorm2d(WIDTH, track_running_stats=True)),
    "torch.RMSNorm": ("tokens", lambda: nn.RMSNorm(WIDTH)),
    "timm.BatchNormAct2d, PReLU": ("images", lambda: _timm("layers.BatchNormAct2d")(WIDTH, act_layer="prelu")),
    "timm.EvoNorm2dB0": ("images", lambda: _timm("layers.EvoNorm2dB0")(WIDTH)),
    "timm.EvoNorm2dB1": ("images", lambda: _timm("layers.EvoNorm2dB1")(WIDTH)),
    "timm.EvoNorm2dB2": ("images", lambda: _timm("layers.EvoNorm2dB2")(WIDTH)),
    "one's own BatchNorm": ("images", lambda: ABN(affine=True)),
    "one's own BatchNorm, without affine": ("images", lambda: ABN(affine=False)),
    "one's own BatchNorm, in a block": ("images", lambda: ABN(affine=True, before=nn.Conv2d(WIDTH, WIDTH, 1))),
}
ALL = CENSUS | RELATIVES
TRACKING = [
    name
    for name in ALL
    if ("Batch" in name and "without statistics" not in name) or "EvoNorm2dB" in name or name.endswith(", tracking")
]


class Net(nn.Module):
    """Pixels to the layout that the norm takes, the norm, and a head."""

    def __init__(self, layout: str, norm: nn.Module) -> None:
        super().__init__()
        self.layout = layout
        self.stem = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.norm = norm
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, images):
        x = self.stem(images)
        if self.layout == "tokens":
            return self.head(self.norm(x.flatten(2).transpose(1, 2)).square().mean(1))
        if self.layout == "rows":
            return self.head(self.norm(x.mean((2, 3))))
        if self.layout == "volumes":
            x = self.norm(x.unsqueeze(-1)).squeeze(-1)
        else:
            x = self.norm(x)
        return self.head(x.square().mean((2, 3)))


def _net(name):
    layout, make = ALL[name]
    torch.manual_seed(0)
    net = Net(layout, make())
    with torch.no_grad():  # ones and zeros hide which tensor was used
        for tensor in [*net.norm.parameters(), *net.norm.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    return net


def _images():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def _wrapped(name):
    plain = _net(name)
    model = entprop.wrap(copy.deepcopy(plain))
    perturb(model)
    return plain, model


@pytest.mark.parametrize("name", ALL)
def test_both_domains_are_exact(name):
    for training in (True, False):
        plain, model = _wrapped(name)
        plain.train(training)
        model.train(training)
        images = _images()
        assert isinstance(model.norm, SwitchedNorm)
        assert isinstance(model.norm, type(plain.norm))
        assert type(model.norm).__name__ == type(plain.norm).__name__
        expected = expected_pass(plain, images, auxiliary_tensors(model))
        main = expected_pass(plain, images)
        differences = [not torch.equal(expected.logits, main.logits)]
        differences += [not torch.equal(expected.buffers[key], main.buffers[key]) for key in main.buffers]
        assert any(differences), "the copies were not perturbed"
        assert_pass(model, plain, images)
        assert_pass(model, plain, images, None)


@pytest.mark.parametrize("name", ALL)
def test_unwrapped_it_is_what_it_was(name):
    plain, model = _wrapped(name)
    model = pickle.loads(pickle.dumps(model))
    entprop.unwrap(model)
    assert type(model.norm) is type(plain.norm)
    assert set(vars(model.norm)) == set(vars(plain.norm))
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", TRACKING)
def test_unrecorded_passes_give_the_same_output_and_record_nothing(name):
    for training, auxiliary in ((True, "aux"), (True, None), (False, "aux")):
        _, model = _wrapped(name)
        model.train(training)
        before, images = snapshot(model), _images()
        with entprop.auxiliary(model, auxiliary, record_statistics=False):
            unrecorded = model(images)
            loss_of(unrecorded, images).backward()
        assert not changed(model, before)
        with entprop.auxiliary(model, auxiliary):
            recorded = model(images)
        torch.testing.assert_close(unrecorded, recorded, rtol=0, atol=0)
        assert changed(model, before) or not training  # torch 2.6 updates instance norms in evaluation too


class Flagged(nn.BatchNorm2d):
    """Shows what it is told of its statistics."""

    def forward(self, x):
        return super().forward(x) + float(self.track_running_stats)


def test_a_batch_norm_has_statistics_in_evaluation_where_none_are_recorded_too():
    model = entprop.wrap(nn.Sequential(Flagged(3))).eval()
    with entprop.auxiliary(model, record_statistics=False):
        torch.testing.assert_close(model(torch.zeros(2, 3, 4, 4)), torch.ones(2, 3, 4, 4))


#: One of each way to read tensors: modules, functions, class attributes, counters, fused activations.
COMPILED = (
    "torch.BatchNorm2d",
    "torch.BatchNorm2d, without statistics",
    "torch.LayerNorm",
    "torch.InstanceNorm2d, tracking",
    "timm.BatchNormAct2d",
    "timm.GroupNormAct",
    "timm.RmsNorm2d",
    "timm.FilterResponseNormTlu2d",
    "timm.EvoNorm2dB0",
    "transformers.ConvNextLayerNorm",
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_into_one_graph_per_domain(name):
    _, model = _wrapped(name)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    images = _images()
    for auxiliary, recording in ((None, True), ("aux", True), ("aux", False), (None, True)):
        with entprop.auxiliary(model, auxiliary, record_statistics=recording):
            expected = model(images)
        with entprop.auxiliary(compiled, auxiliary, record_statistics=recording):
            found = compiled(images)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dict(compiled._orig_mod.named_buffers()), dict(model.named_buffers()))


def _gates():
    return [
        _timm("layers.grn.GlobalResponseNorm")(WIDTH, channels_last=False),
        _timm("models.nfnet.NormFreeBlock")(WIDTH, WIDTH, act_layer=nn.ReLU),
        _hf("convnextv2", "ConvNextV2GRN")(WIDTH),
    ]


def test_gates_and_norm_free_blocks_are_no_norms():
    assert not any(is_norm(module) for module in _gates())
    subclass = type("MyGRN", (type(_gates()[0]),), {})
    assert not is_norm(subclass(WIDTH))


@pytest.mark.parametrize("make", [lambda: _gates()[0], lambda: _gates()[2]], ids=["timm", "transformers"])
def test_response_norms_by_include(make):
    gate = make()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.uniform_()
    pooled = [nn.AdaptiveAvgPool2d(WIDTH), nn.Flatten(), nn.Linear(WIDTH**3, 5)]
    plain = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH), gate, *pooled)
    assert list(find_norms(plain)) == ["1"]
    model = entprop.wrap(copy.deepcopy(plain), include=type(gate))
    assert set(entprop.summary(model).norms) == {"BatchNorm2d", type(gate).__name__}
    perturb(model)
    images = torch.randn(4, 3, WIDTH, WIDTH)  # as wide as it has channels: one gate takes NCHW, the other NHWC
    assert_pass(model, plain, images)


def test_stateless_and_frozen_norms_are_skipped():
    frozen = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(WIDTH)
    stateless = [
        nn.LayerNorm(WIDTH, elementwise_affine=False),
        nn.GroupNorm(2, WIDTH, affine=False),
        nn.InstanceNorm2d(WIDTH),
        nn.BatchNorm2d(WIDTH, affine=False, track_running_stats=False),
        nn.LocalResponseNorm(2),
        _timm("layers.RmsNorm")(WIDTH, affine=False),
        frozen,
    ]
    assert not any(is_norm(module) for module in stateless)
    assert list(find_norms(nn.Sequential(*stateless, nn.LayerNorm(WIDTH)))) == [str(len(stateless))]


class MyNorm(nn.Module):
    """Its weight has the shape of images."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 3, 1, 1))

    def forward(self, x):
        return x * self.scale


def test_blocks_named_after_norms_are_no_norms():
    class ConvNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))
            self.conv = nn.Conv2d(3, 3, 1)

    assert not is_norm(ConvNorm())
    assert is_norm(MyNorm())


def test_a_norm_with_image_shaped_weights_stays_a_norm_once_wrapped():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), MyNorm())
    plain = [len(group["params"]) for group in entprop.parameter_groups(model, 0.1)]
    wrapped = [len(group["params"]) for group in entprop.parameter_groups(entprop.wrap(model), 0.1)]
    assert (plain, wrapped) == ([1, 2], [1, 3])


class NormedLinear(nn.Linear):
    """A cosine classifier."""

    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


class NormedConv2d(nn.Conv2d):
    """A convolution with standardised weights."""

    def forward(self, x):
        return self._conv_forward(x, nn.functional.normalize(self.weight), self.bias)


class NormedPrototypes(nn.Module):
    """A cosine classifier that is no linear layer."""

    def __init__(self, features, classes):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(classes, features))

    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.prototypes))


def test_layers_with_normalised_weights_are_no_norms_unless_included():
    layers = [
        NormedLinear(8, 5),
        NormedLinear(8, 1, bias=False),
        NormedConv2d(3, 8, 3),
        NormedConv2d(8, 8, 1, groups=8, bias=False),
        NormedPrototypes(8, 5),
    ]
    assert not any(is_norm(layer) for layer in layers)
    net = nn.Sequential(nn.LayerNorm(8), *layers)
    assert list(find_norms(net)) == ["0"]
    assert list(find_norms(net, include=[NormedLinear, NormedPrototypes])) == ["0", "1", "2", "5"]
    model = entprop.wrap(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), NormedLinear(8, 5, bias=False)))
    with entprop.auxiliary(model):
        model(torch.randn(4, 8)).square().mean().backward()
    assert model[2].weight.grad is not None
    decayed, _ = entprop.parameter_groups(model, 0.1)
    assert any(parameter is model[2].weight for parameter in decayed["params"])


def _three():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["1", "3", "4"]),
        ({"exclude": nn.LayerNorm}, ["4"]),
        ({"exclude": "1"}, ["3", "4"]),
        ({"exclude": "[1-3]"}, ["4"]),
        ({"exclude": []}, ["1", "3", "4"]),
        ({"exclude": ["1", nn.BatchNorm1d]}, ["3"]),
        ({"exclude": lambda name, module: int(name or 0) > 2}, ["1"]),
        ({"include": "2"}, ["1", "2", "3", "4"]),
        ({"include": nn.Linear, "exclude": "2"}, ["0", "1", "3", "4"]),
    ],
    ids=["default", "class", "name", "glob", "none", "list", "predicate", "include", "both"],
)
def test_selectors(options, expected):
    assert list(find_norms(_three(), **options)) == expected
    model = entprop.wrap(_three(), **options)
    assert [name for name, module in model.named_modules() if isinstance(module, SwitchedNorm)] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "blok.*"}, r"include='blok\.\*' matches no module"),
        ({"exclude": nn.Conv2d}, "exclude=.*Conv2d.* matches no module"),
        ({"exclude": lambda name, module: False}, "matches no module"),
        ({"include": nn.Sequential}, "own parameters or buffers; these own none: ''"),
        ({"include": []}, "include= is empty"),
        ({"include": 5}, "include= holds 5, which selects nothing. Give a module class"),
        ({"exclude": ["1", None]}, "exclude= holds None"),
        ({"exclude": nn.LayerNorm(4)}, "exclude= holds LayerNorm"),
        ({"include": int}, "matches no module"),
    ],
)
def test_selectors_that_cannot_be_meant(options, message):
    model = _three()
    keys = list(model.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        entprop.wrap(model, **options)
    assert list(model.state_dict()) == keys


def test_a_name_misspelt_is_answered_with_close_ones():
    model = nn.Sequential()
    model.add_module("norm_one", nn.LayerNorm(4))
    with pytest.raises(ConfigurationError, match="Close names: norm_one"):
        entprop.wrap(model, exclude="norm_on")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3)), {}, "has no norm layer \\(AlexNet"),
        (nn.Sequential(nn.LayerNorm(3)), {"exclude": nn.LayerNorm}, "exclude= removes all 1 norm layers"),
        (nn.Sequential(nn.LayerNorm(3, elementwise_affine=False)), {}, "have no state that training moves \\('0'\\)"),
        ("gate", {}, "only GlobalResponseNorm \\('0'\\), which is not a norm by default"),
    ],
    ids=["none", "excluded", "stateless", "gates"],
)
def test_four_causes_of_no_norm_have_four_messages(model, options, message):
    if model == "gate":
        model = nn.Sequential(_gates()[0])
    with pytest.raises(NoNormLayersError, match=message):
        entprop.wrap(model, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LazyBatchNorm2d(), "'?0'? is lazy and not initialised"),
        (lambda: parametrizations.weight_norm(nn.GroupNorm(2, 4)), "is parametrised"),
        (lambda: prune.l1_unstructured(nn.BatchNorm2d(4), "weight", 0.5), "computes its weight from other tensors"),
        (lambda: nn.utils.spectral_norm(nn.LayerNorm((4, 4))), "computes its weight from other tensors"),
    ],
    ids=["lazy", "parametrised", "pruned", "spectral norm"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_norms_whose_tensors_are_not_their_own(make, message):
    model = nn.Sequential(make(), nn.LayerNorm(3))
    keys = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=message):
        entprop.wrap(model)
    assert list(model.state_dict()) == keys
    assert not any(isinstance(module, SwitchedNorm) for module in model.modules())
