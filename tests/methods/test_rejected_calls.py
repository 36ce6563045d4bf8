"""A training step that fails leaves no trace, and what one returns is safe to handle."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import PGD
from entprop_wrap.methods import AdvProp, FastAdvProp, Method, Vanilla
from tests.helpers.every_method import METHODS, named
from tests.helpers.traceless import IMAGES, LABELS, ready, same, state
from tests.helpers.trainer_toys import BatchNormNet, make

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")


def failing(calls):
    """A loss that fails after so many ``calls``."""
    left = [calls]

    def loss(logits, labels):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("a loss of one's own")
        return F.cross_entropy(logits, labels)

    return loss


BAD = {
    "loss": {"loss": failing(1)},
    "loss_later": {"loss": failing(2)},
    "loss_none": {"loss": lambda logits, labels: None},
    "loss_detached": {"loss": lambda logits, labels: F.cross_entropy(logits.detach(), labels)},
    "backward_fails": {"backward": lambda loss: 1 / 0},
    "backward_idle": {"backward": lambda loss: None},
    "backward_twice": {"backward": lambda loss: (loss.backward(), loss.backward())},
    "backward_arguments": {"backward": lambda: None},
}


CASES = [(entprop.EntProp(fraction=0.5), bad, later) for bad in BAD for later in (False, True)]
CASES += [
    (method, bad, False) for method in (AdvProp(PGD(steps=1)), FastAdvProp(0.5)) for bad in ("loss", "loss_later")
]


@pytest.mark.parametrize(("method", "bad", "later"), CASES)
def test_a_bad_loss_or_backward_leaves_no_trace(method, bad, later):
    model = ready(auxiliaries=method.auxiliaries or ("aux",))
    if later:
        entprop.training_step(model, IMAGES, LABELS, method=method)
        model.zero_grad()
    before = state(model)
    options = {"loss": failing(1 if bad == "loss" else 2)} if bad in ("loss", "loss_later") else BAD[bad]
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it raises
        entprop.training_step(model, IMAGES, LABELS, method=method, **options)
    assert same(model, before)
    entprop.training_step(model, IMAGES, LABELS, method=method)


def test_a_first_step_that_fails_keeps_gradients_that_were_there():
    model = ready()
    model(IMAGES).sum().backward()
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        entprop.training_step(model, IMAGES, LABELS, backward=lambda loss: (loss.backward(), 1 / 0))
    assert same(model, before)


@pytest.mark.parametrize("then", ["step", "training_step"])
def test_what_a_later_step_that_fails_added_to_earlier_gradients_is_not_stepped_on(then):
    model = ready()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        entprop.training_step(model, IMAGES, LABELS)
    before = state(model)
    with pytest.raises(ConfigurationError):  # before any backward
        entprop.training_step(model.eval(), IMAGES, LABELS)
    entprop.training_step(model.train(), IMAGES, LABELS)
    model.load_state_dict({name: before[name] for name in model.state_dict()})
    once = iter([torch.Tensor.backward])
    with pytest.raises(StopIteration):
        entprop.training_step(model, IMAGES, LABELS, backward=lambda loss: next(once)(loss))
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"failed between its backwards.*zero_grad"):
            optimizer.step() if then == "step" else entprop.training_step(model, IMAGES, LABELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.zero_grad(set_to_none=then == "step")
    entprop.training_step(model, IMAGES, LABELS)
    optimizer.step()


class Replacing(nn.Module):
    """Records by a new tensor, rather than in place."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, pixels):
        self.seen = self.seen + 1
        return self.fc(pixels.mean((2, 3)))


def test_buffers_that_are_replaced_are_put_back():
    model = Replacing()
    with pytest.raises(ConfigurationError):
        entprop.training_step(model, IMAGES, LABELS, method=Vanilla(), loss=nn.CrossEntropyLoss(reduction="sum"))
    assert model.seen == 0


class Growing(BatchNormNet):
    """As observers of torch.ao.quantization, whose buffers get their size in the first pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.empty(0))

    def forward(self, images):
        self.seen.resize_(3).fill_(1)
        return super().forward(images)


def test_buffers_that_grow_are_put_back():
    model = make(Growing).train()
    with pytest.raises(ZeroDivisionError):
        entprop.training_step(model, IMAGES, LABELS, method=Vanilla(), backward=lambda loss: 1 / 0)
    assert model.seen.shape == (0,)


def test_a_method_that_ends_twice_is_refused_where_backward_asks_for_the_last():
    class Twice:
        auxiliaries = ()

        def step(self, step):
            for _ in range(2):
                logits = step.forward(step.images)
                loss = step.loss(logits, step.labels)
                step.backward(loss)
            return step.output(main_loss=loss, logits=logits, passes=2.0)

    model = ready()
    entprop.training_step(model, IMAGES, LABELS, method=Twice())
    with pytest.raises(ConfigurationError, match=r"step.only_local\(\)"):
        entprop.training_step(model, IMAGES, LABELS, method=Twice(), backward=lambda loss, last: loss.backward())


class Silent(Method):
    """A method of one's own that forgot something."""

    def __init__(self, last, returns):
        self.last, self.returns = last, returns

    def step(self, step):
        with nullcontext() if self.last else step.only_local():
            loss = step.loss(logits := step.forward(step.images), step.labels)
            step.backward(loss)
        return step.output(main_loss=loss, logits=logits, passes=1.0) if self.returns else None


@pytest.mark.parametrize(("last", "returns"), [(True, False), (False, True)])
def test_a_method_that_trains_nothing_or_returns_nothing_is_refused(last, returns):
    model = ready()
    before = state(model)
    with pytest.raises(ConfigurationError, match=r"Silent.step\(\) must call step.backward.* and return step.output"):
        entprop.training_step(model, IMAGES, LABELS, method=Silent(last, returns))
    assert same(model, before)


# What comes back ------------------------------------------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """As MPS, which has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(
            isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in torch.utils._pytree.tree_leaves(result)
        ):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return result


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_the_output_is_detached_short_in_print_and_has_its_numbers_without_float64_on_the_device(method):
    model, space = ready(auxiliaries=method.auxiliaries or ("aux",)), entprop.PixelSpace()
    space.bounds(IMAGES)  # constants are made in float64 on the CPU, also for other devices
    with NoFloat64():
        out = entprop.training_step(model, IMAGES, LABELS, method=method, pixel_space=space)
        numbers = out.metrics()
    tensors = [value for value in vars(out).values() if isinstance(value, torch.Tensor)]
    assert not any(tensor.requires_grad for tensor in tensors)
    text = repr(out)
    assert len(text) < 200
    assert "tensor" not in text
    assert f"main_loss={float(out.main_loss):.4g}" in text
    assert numbers["loss"] == pytest.approx(float(out.loss))


@pytest.mark.parametrize("method", [*METHODS, entprop.EntProp(uncertainty="random", lagged=True)], ids=named)
def test_the_default_device_of_torch_is_nowhere_meant(method):
    step = entprop.TrainingStep(make(BatchNormNet).train(), method, generator=torch.Generator())
    with torch.device("meta"):  # whose tensors hold nothing
        step(IMAGES, LABELS)


def test_a_backward_after_the_step_says_that_it_is_done():
    out = entprop.training_step(ready(), IMAGES, LABELS)
    for loss in (out.loss, out.main_loss, out.aux_loss):
        with pytest.raises(ConfigurationError, match=r"has run the backward of this loss: leave out loss.backward\(\)"):
            loss.backward()
    assert type(out.loss + 1) is type(out.loss.detach()) is type(copy.deepcopy(out.loss)) is torch.Tensor
    file = io.BytesIO()
    torch.save({"loss": out.loss}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["loss"] == out.loss
