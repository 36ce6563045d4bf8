"""The head fitted first, against scikit-learn; and weights that go part of the way back."""

import copy

import pytest
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

import entprop_wrap as entprop
from entprop_wrap.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    ImageError,
    LabelError,
    ModelOutputError,
    UnsupportedModelError,
)
from entprop_wrap.finetuning import interpolate, linear_probe, repair_keep_probabilities
from entprop_wrap.robustness.distributed import gather
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.diagnosed import images, loader, make
from tests.helpers.processes import run_processes
from tests.helpers.versions import RECENT_TORCH
from tests.reference.models import CLASSES

SOME = [
    *("torchvision/mobilenet_v2", "torchvision/swin", "timm/efficientnet", "timm/vit"),
    *("transformers/resnet", "transformers/vit", "transformers/cvt"),
]


def reference(features, labels):
    """Return weight, bias and held-out accuracy, with the penalty chosen as the docstring says."""
    mean = features.mean(0)
    scale = (features - mean).std()
    scaled = ((features - mean) / scale).numpy()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).numpy()
    held, rest = order[: round(0.2 * len(labels))], order[round(0.2 * len(labels)) :]
    tried = []

    def fit(rows, penalty):
        return LogisticRegression(C=1 / (penalty * len(rows)), tol=1e-10, max_iter=5000).fit(scaled[rows], labels[rows])

    for penalty in (10, 3, 1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
        fitted = fit(rest, penalty)
        loss = -fitted.predict_log_proba(scaled[held])[range(len(held)), labels[held]].mean()
        if tried and loss >= tried[-1][0]:
            break
        tried.append((loss, penalty, fitted.score(scaled[held], labels[held])))
    _, penalty, accuracy = tried[-1]
    fitted = fit(order, penalty)
    weight = torch.from_numpy(fitted.coef_) / scale
    return weight, torch.from_numpy(fitted.intercept_) - weight @ mean, accuracy, len(tried)


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_head_is_a_logistic_regression_and_nothing_else_changes(wrapped):
    model = make(wrapped=wrapped).train()
    pixels, labels = images(120), torch.arange(120) % CLASSES
    pixels += 0.4 * labels.view(-1, 1, 1, 1) * torch.tensor([1.0, -1, 0]).view(1, 3, 1, 1)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = linear_probe(model, list(zip(pixels.split(50), labels.split(50), strict=True)))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    given = []
    model.eval().fc.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        model(pixels)
    weight, bias, accuracy, tried = reference(given[0], labels)
    assert 2 < tried < 9  # the penalty was neither the first nor the last
    assert found == accuracy > 1.5 / CLASSES
    torch.testing.assert_close(model.fc.weight.data, weight, rtol=0, atol=2e-3)
    # scikit-learn leaves a constant of all classes in the biases open
    torch.testing.assert_close(model.fc.bias.data - model.fc.bias.mean(), bias - bias.mean(), rtol=0, atol=2e-3)


def test_soft_labels_of_one_class_give_the_same_head():
    hard, soft = make(), make()
    linear_probe(hard, loader(40))
    linear_probe(soft, [(batch, torch.eye(CLASSES)[labels].double()) for batch, labels in loader(40)])
    torch.testing.assert_close(hard.fc.weight, soft.fc.weight)


@pytest.mark.parametrize("name", SOME)
def test_real_architectures(name):
    architecture = next(one for one in ARCHITECTURES if one.name == name)
    model, batch = architecture.build(), architecture.images(12)
    with torch.no_grad():
        before = model.eval()(batch)
    linear_probe(model, [(batch, torch.arange(12) % 3)])
    with torch.no_grad():
        after = model(batch)
    before, after = (getattr(output, "logits", output) for output in (before, after))
    assert not torch.allclose(before, after)
    assert (after.argmax(1) < 3).all()


class Head(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), head

    def forward(self, pixels):
        return self.head(self.body(pixels))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, features):
        return (self.one(features) + self.two(features)) / 2


class Slice(nn.Module):
    def forward(self, logits):
        return logits[:, 1:]


class Times(nn.Module):
    def forward(self, logits):
        return 10 * logits


def zero(head):
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def pruned():
    head = nn.Linear(6, CLASSES)
    prune.l1_unstructured(head, "weight", 0.5)
    return head


@pytest.mark.parametrize(
    "head",
    [
        nn.Linear(6, CLASSES, bias=False),
        TwoHeads(),
        nn.Sequential(nn.Linear(6, CLASSES), nn.LayerNorm(CLASSES)),
        nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, CLASSES, 1), nn.Flatten()),
        zero(TwoHeads()),
        zero(nn.Sequential(nn.Linear(6, CLASSES), Times())),
        nn.Sequential(nn.Linear(6, CLASSES + 1), Slice()),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, CLASSES)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, CLASSES)),
        pruned(),
    ],
    ids=[
        *("no bias", "two heads", "something after it", "convolution", "two heads of zeros", "zeros, and a factor"),
        *("a slice", "weight norm", "spectral norm", "pruned"),
    ],
)
def test_other_heads_are_refused_and_left_alone(head):
    model = Head(head).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=r"expected the output of one nn\.Linear"):
        linear_probe(model, loader(40))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (lambda: loader(9), DataError, "at least 10 images, found 9"),
        (lambda: [], DataError, "at least 10 images, found 0"),
        (lambda: [images(20)], DataError, r"expected batches \(images, labels\)"),
        (lambda: [(images(20), torch.full((20,), CLASSES))], LabelError, "Class indices must be in"),
        (lambda: [(images(20) / 0, torch.arange(20) % CLASSES)], ModelOutputError, "not finite"),
        (lambda: [(images(20).byte(), torch.arange(20) % CLASSES)], ImageError, "found torch.uint8"),
        (lambda: TensorDataset(images(20), torch.arange(20)), DataError, "such as a DataLoader; found TensorDataset"),
    ],
    ids=["few", "none", "no labels", "labels out of range", "not finite", "bytes", "a dataset"],
)
def test_what_is_no_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        linear_probe(make(), data())


def test_a_head_of_zeros_is_fitted():
    started, zeros = make(), make()
    zero(zeros.fc)
    assert linear_probe(started, loader(40)) == linear_probe(zeros, loader(40))
    assert torch.equal(started.fc.weight, zeros.fc.weight)


def test_images_take_the_type_of_the_model():
    assert 0 <= linear_probe(make().bfloat16(), loader(40)) <= 1


def test_features_may_come_from_autocast():
    exact, rounded = make().float(), make().float()
    linear_probe(exact, loader(40))
    with torch.autocast("cpu", torch.bfloat16):
        linear_probe(rounded, loader(40))
    assert rounded.fc.weight.dtype == torch.float32
    torch.testing.assert_close(rounded.fc.weight, exact.fc.weight, rtol=0.2, atol=0.2)


def test_nothing_is_fitted_in_inference_mode():
    with torch.inference_mode(), pytest.raises(ConfigurationError, match="inference_mode"):
        linear_probe(make(), loader(40))


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1])
def test_weights_go_back_by_a_share(wrapped, share):
    model = make(wrapped=wrapped)
    now = copy.deepcopy(model.state_dict())
    start = {name: value + 1 for name, value in entprop.main_state_dict(model).items()}
    assert interpolate(model, start, share) is model
    for name, value in model.state_dict().items():
        moved = name in start and value.is_floating_point()
        torch.testing.assert_close(value, now[name] + (1 - share) if moved else now[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "dropout", "momentum"),
    [("MobileNetV1", 0.001, 0.1), ("MobileNetV2", 0.2, 0.1), ("EfficientNet", 0.5, 0.1)],
)
def test_shares_to_keep_are_repaired_once(name, dropout, momentum):
    config = getattr(transformers, f"{name}Config")(image_size=32)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForImageClassification")(config)
    assert repair_keep_probabilities(model)
    assert repair_keep_probabilities(model) == []
    assert model.dropout.p == pytest.approx(dropout)
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {momentum}


class Twice(nn.Module):
    """Its convolution has two names, and it has state that is not a tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.features = nn.Sequential(self.conv, self.norm)

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_a_tensor_of_two_names_goes_back_once():
    model = Twice()
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for tensor in (*model.parameters(), model.norm.running_mean):
            tensor.add_(1)
    interpolate(model, start, 0.25)
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            moved = 0.0 if name.endswith("running_var") else 0.25
            torch.testing.assert_close(value, start[name] + moved)


@pytest.mark.parametrize(
    ("change", "share", "error", "message"),
    [
        (lambda start: start.pop("fc.bias"), 0.5, CheckpointError, "'fc.bias' is missing on one side"),
        (lambda start: start.update(more=torch.ones(1)), 0.5, CheckpointError, "'more' is missing on one side"),
        (lambda start: start.update({"fc.bias": torch.ones(9)}), 0.5, CheckpointError, "'fc.bias' .* another shape"),
        (lambda start: None, 1.5, ConfigurationError, "share must be a number in"),
    ],
)
def test_another_start_is_refused(change, share, error, message):
    model = make()
    start = copy.deepcopy(entprop.main_state_dict(model))
    change(start)
    with pytest.raises(error, match=message):
        interpolate(model, start, share)


def test_a_start_that_has_moved_with_the_model_is_refused():
    model = make()
    with pytest.raises(CheckpointError, match=r"copy\.deepcopy"):
        interpolate(model, entprop.main_state_dict(model))


def in_processes(rank):
    """What linear_probe() and interpolate() do to a model in DDP, and to one that is sharded."""
    data = list(loader(40))
    alone, model = make(wrapped=False), make(wrapped=False)
    parallel = DistributedDataParallel(model)
    linear_probe(parallel, data)
    with pytest.raises(DataError, match=r"2 processes do not go through the same images.*before accelerator\.prepare"):
        linear_probe(make(), data[rank:])
    heads = gather((alone.fc.weight, model.fc.weight))
    assert torch.equal(heads[0][1], heads[1][1])
    assert not torch.equal(*heads[0])
    if RECENT_TORCH:
        back_when_sharded(make())
    return model.fc.weight.detach()


def back_when_sharded(model):
    from torch.distributed.fsdp import fully_shard

    whole = copy.deepcopy(entprop.main_state_dict(model))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(UnsupportedModelError, match="found a sharded one"):
        linear_probe(model, loader(40))
    start = copy.deepcopy(entprop.main_state_dict(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    interpolate(model, start, 0.25)
    for name, value in entprop.main_state_dict(model).items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        moved = 0.25 if name in dict(model.named_parameters()) else 0
        torch.testing.assert_close(value, whole[name] + moved, rtol=0, atol=1e-6, check_dtype=False)
    with pytest.raises(CheckpointError, match=r"only one of the two sharded\. After fully_shard"):
        interpolate(model, whole)


def test_two_processes_end_with_one_head():
    alone = make(wrapped=False)
    linear_probe(alone, loader(40))
    for weight in run_processes(in_processes):
        torch.testing.assert_close(weight, alone.fc.weight.detach())
