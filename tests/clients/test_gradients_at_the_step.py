"""Loops in the shape of torchvision's train.py, DeiT's engine.py and timm's scalers: who wipes, who steps, on what."""

import math

import pytest
import torch
import torch.nn.functional as F

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError, DivergedError, UnsupportedModelError
from entprop_wrap.methods import AdvProp, FastAdvProp, Vanilla
from entprop_wrap.utils.optimizer_steps import Watch
from tests.helpers.traceless import IMAGES, LABELS, same, state
from tests.helpers.trainer_toys import BatchNormNet, make

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")


def ready(learning_rate=0.1, **options):
    model = entprop.wrap(make(BatchNormNet)).train()
    return model, torch.optim.SGD(entprop.parameter_groups(model, 1e-4), lr=learning_rate, **options)


def step(model, method=None, loss=None, backward=None, images=IMAGES):
    return entprop.training_step(
        model, images, LABELS, method=method or entprop.EntProp(fraction=0.5), loss=loss, backward=backward
    )


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def moved(model, before):
    return any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# zero_grad between forward and backward -------------------------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False])
def test_wiped_gradients_raise_at_the_optimizers_step(to_none):
    model, optimizer = ready()
    step(model)
    optimizer.zero_grad(set_to_none=to_none)  # stood between forward and loss.backward()
    with pytest.raises(ConfigurationError, match=r"zero_grad\(\) was called in between"):
        optimizer.step()


def test_gradients_wiped_in_a_later_step_raise():
    model, optimizer = ready()
    step(model)
    optimizer.step()
    step(model)
    optimizer.zero_grad()
    with pytest.raises(ConfigurationError, match="are gone"):
        optimizer.step()


def test_loops_that_are_right_pass():
    model, optimizer = ready(momentum=0.9)
    for _ in range(2):  # zeroed before, as in torchvision; after; accumulated; not stepped at all
        optimizer.zero_grad()
        step(model)
        optimizer.step()
    optimizer.zero_grad()
    step(model), step(model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    step(model)
    optimizer.zero_grad()  # the batch is dropped
    step(model)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # of other losses, or none: no training step went before


def test_optimizers_of_parts_and_of_other_models_pass():
    plain = make(BatchNormNet)
    plain.spare = torch.nn.Linear(2, 2)  # no pass reaches it
    model = entprop.wrap(plain).train()
    head, spare = torch.optim.SGD(model.fc.parameters(), lr=0.1), torch.optim.SGD(model.spare.parameters(), lr=0.1)
    rest = torch.optim.SGD([*model.conv.parameters(), *model.bn.parameters()], lr=0.1)
    _, other = ready()
    step(model)
    for optimizer in (head, spare, rest, other):
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    step(model, Vanilla())
    rest.step()
    head.step()


def test_closures_are_not_taken_for_wiped_steps():
    model, optimizer = ready()

    def closure():
        optimizer.zero_grad()
        return step(model).loss

    for _ in range(3):
        optimizer.step(closure)
        optimizer.zero_grad()


def test_a_scaler_that_skips_passes():
    model, optimizer = ready()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    step(model, backward=lambda loss: scaler.scale(loss * math.inf).backward())
    before = weights(model)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert not moved(model, before)
    step(model, backward=lambda loss: scaler.scale(loss).backward())
    scaler.step(optimizer)
    assert moved(model, before)


# Scalers that step ----------------------------------------------------------------------------------------------------


class NativeScaler:
    """The shape of timm's: backward, clip and step in one call, unless told that there is more to come."""

    def __init__(self):
        self.steps, self.scaler = 0, torch.amp.GradScaler("cpu", init_scale=2.0**4)

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, create_graph=False, need_update=True):
        self.scaler.scale(loss).backward(create_graph=create_graph)
        if need_update:
            if clip_grad is not None:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
            self.scaler.step(optimizer)
            self.scaler.update()
            self.steps += 1


METHODS = {
    "entprop": entprop.EntProp(fraction=0.5),
    "advprop": AdvProp(),
    "fast_advprop": FastAdvProp(fraction=0.5),
    "vanilla": Vanilla(),
}


#: Today's, and that of timm 0.4, which DeiT needs: it steps whenever it is called.
SCALERS = {
    "told": lambda scaler, loss, last, *how: scaler(loss, *how, need_update=last),
    "called last": lambda scaler, loss, last, *how: (
        scaler(loss, *how) if last else scaler.scaler.scale(loss).backward()
    ),
}


@pytest.mark.parametrize("way", SCALERS)
@pytest.mark.parametrize("name", METHODS)
def test_a_scaler_that_steps_steps_once_a_batch(name, way):
    model, optimizer = ready()
    reference, its_optimizer = ready()
    scaler = NativeScaler()
    for number in range(1, 4):
        for net, optim in ((model, optimizer), (reference, its_optimizer)):
            torch.manual_seed(number)
            optim.zero_grad()
            if net is model:
                step(
                    net,
                    METHODS[name],
                    backward=lambda loss, last: SCALERS[way](scaler, loss, last, optimizer, 1.0, model.parameters()),
                )
            else:
                step(net, METHODS[name])
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optim.step()
        assert scaler.steps == number
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_step_inside_a_backward_that_is_not_the_last_raises_and_leaves_no_trace():
    model, optimizer = ready()
    scaler, before = NativeScaler(), state(model)
    with pytest.raises(ConfigurationError, match=r"backward=lambda loss, last: loss_scaler\("):
        step(model, backward=lambda loss: scaler(loss, optimizer))
    assert same(model, before)


def test_optimizers_that_step_in_hooks_of_the_backward_raise():
    model, _ = ready()
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())
    with pytest.raises(UnsupportedModelError, match="stepped inside a backward"):
        step(model)


# Losses that are not finite -------------------------------------------------------------------------------------------


def not_finite(logits, labels):
    return F.cross_entropy(logits, labels) * math.nan


def test_a_loss_that_is_nan_raises_before_anything_changes():
    model, _ = ready()
    before = state(model)
    with pytest.raises(DivergedError, match="The loss is nan"):
        step(model, loss=not_finite)
    assert same(model, before)


def test_large_gradients_of_half_precision_are_finite():
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    weight.grad = torch.full_like(weight, 60_000)  # their sum is more than float16 holds
    watch = Watch()
    watch._finite = torch.tensor(False)
    assert not watch._not_finite(torch.optim.SGD([weight]), [weight])


def test_a_loss_that_is_nan_behind_a_backward_raises_before_the_weights_move():
    model, optimizer = ready()
    step(model, loss=not_finite, backward=torch.Tensor.backward)
    before = weights(model)
    with pytest.raises(DivergedError, match="not finite"):
        optimizer.step()
    assert not moved(model, before)
    optimizer.zero_grad()
    step(model, backward=torch.Tensor.backward)
    optimizer.step()


@pytest.mark.parametrize("last", ["weight", "entprop_aux"])
def test_nan_in_one_of_two_passes_raises_in_whatever_order_parameters_are(last):
    model, _ = ready()
    names = sorted(dict(model.named_parameters()), key=lambda name: f"bn.{last}" in name)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD([{"params": [parameters[name]]} for name in names], lr=0.1)

    def once(logits, labels):  # finite in the main pass
        return F.cross_entropy(logits, labels) * (math.nan if len(logits) < len(LABELS) else 1.0)

    step(model, loss=once, backward=torch.Tensor.backward)
    before = weights(model)
    with pytest.raises(DivergedError, match="not finite"):
        optimizer.step()
    assert not moved(model, before)


def test_a_batch_that_a_loop_drops_for_its_loss_is_forgotten():
    for to_none in (True, False):
        model, optimizer = ready()
        out = step(model, loss=not_finite, backward=torch.Tensor.backward)
        assert not out.loss.isfinite()
        optimizer.zero_grad(set_to_none=to_none)
        step(model, backward=torch.Tensor.backward)
        optimizer.step()


def test_a_closure_whose_loss_is_nan_raises_with_the_metrics():
    model, optimizer = ready()
    outputs = []

    def closure():
        outputs.append(step(model, loss=not_finite, backward=torch.Tensor.backward))
        return outputs[-1].loss

    optimizer.step(closure)
    with pytest.raises(DivergedError, match="its loss was not finite"):
        outputs[-1].metrics()
