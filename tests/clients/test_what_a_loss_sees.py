"""Losses that see more than logits and labels: several heads, a teacher, rows of the batch; binary ones."""

import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError, LabelError, ModelOutputError, UnsupportedModelError
from entprop_wrap.functional.attacks import PGD
from entprop_wrap.methods import MEADA, AdversarialTraining, AdvProp, EntropyAscent, FastAdvProp, MixProp, Vanilla
from tests.helpers.traceless import IMAGES, LABELS, ready, same, state
from tests.helpers.trainer_toys import BatchNormNet, make

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

METHODS = {
    "vanilla": Vanilla(label_smoothing=0.1),
    "entprop": entprop.EntProp(fraction=0.5, attack_steps=2),
    "entprop_auxiliary": entprop.EntProp(fraction=0.5, mix_on="auxiliary"),
    "advprop": AdvProp(PGD(steps=2)),
    "fast_advprop": FastAdvProp(fraction=0.5),
    "mixprop": MixProp(),
    "meada": MEADA(EntropyAscent(steps=2), fraction=0.5),
    "pgd": AdversarialTraining(PGD(steps=2), clean_weight=0.5),
    "trades": AdversarialTraining(PGD(steps=2), kind="trades"),
}


class Outputs(NamedTuple):
    """What torchvision's GoogLeNet returns in training mode, in form."""

    logits: Tensor
    aux_logits: Tensor


class TwoHeads(BatchNormNet):
    def __init__(self, form):
        super().__init__()
        self.second, self.form = nn.Linear(8, 4), form

    def forward(self, pixels):
        hidden = torch.relu(self.bn(self.conv(pixels))).mean((2, 3))
        return self.form(self.fc(hidden), self.second(hidden))


FORMS = {
    "tuple": (lambda *heads: heads, r"outputs\[1\] \(12, 4\)"),
    "named": (Outputs, r"outputs\.aux_logits \(12, 4\)"),
    "dict": (lambda first, second: {"logits": first, "distilled": second}, r"outputs\['distilled'\] \(12, 4\)"),
    "other classes": (lambda first, second: (first, second[:, :3]), r"outputs\[1\] \(12, 3\)"),
}


def step(model, method=None, loss=None, labels=LABELS, images=IMAGES):
    return entprop.training_step(model, images, labels, method=method or METHODS["entprop"], loss=loss)


# Heads ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_head_that_the_loss_does_not_see_is_refused_by_name(form):
    make_output, message = FORMS[form]
    model = ready(TwoHeads, form=make_output)
    before = state(model)
    with pytest.raises(ModelOutputError, match=message):
        step(model)
    assert same(model, before)


@pytest.mark.parametrize("form", ["tuple", "named"])
def test_a_compiled_model_hides_no_head(form):
    model = torch.compile(ready(TwoHeads, form=FORMS[form][0]), backend="aot_eager")
    with pytest.raises(ModelOutputError, match="heads"):
        step(model)


@pytest.mark.parametrize(
    "form",
    [
        lambda first, second: (first + second, first, second),
        lambda first, second: (first + second, first.detach()),
        lambda first, second: {"logits": (first + second), "loss": None},
    ],
    ids=["ensemble", "detached", "dict"],
)
def test_outputs_that_hide_no_head_pass(form):
    step(ready(TwoHeads, form=form))


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_of_both_heads_trains_both(name):
    model = ready(TwoHeads, form=Outputs)
    seen = []

    def loss(logits, labels, outputs):
        assert torch.equal(outputs.logits, logits)
        seen.append(len(outputs.aux_logits))
        return F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(outputs.aux_logits, labels)

    step(model, METHODS[name], loss)
    step(model, METHODS[name], loss)
    assert model.second.weight.grad.any()
    assert seen


class Distillation(nn.Module):
    """The shape of DeiT's DistillationLoss: images for the teacher, both heads of the student, labels."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, inputs, outputs, labels):
        with torch.no_grad():
            teacher = self.teacher(inputs)
        return 0.5 * F.cross_entropy(outputs[0], labels) + 0.5 * F.cross_entropy(outputs[1], teacher.argmax(1))


@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_sees_the_images_that_the_student_saw(name):
    model, seen, passed = ready(TwoHeads, form=lambda *heads: heads), [], []
    model.register_forward_pre_hook(lambda module, args: passed.append(args[0].detach()))

    def teacher(inputs):
        seen.append(inputs)
        return inputs.mean((2, 3))

    criterion = Distillation(teacher)
    for _ in range(2):  # the first step calls a loss once more
        seen.clear(), passed.clear()
        step(model, METHODS[name], lambda logits, labels, images, outputs: criterion(images, outputs, labels))
    assert all(any(inputs is image or torch.equal(inputs, image) for image in passed) for inputs in seen)
    assert model.second.weight.grad.any()


@pytest.mark.parametrize("name", METHODS)
def test_rows_say_where_labels_stand_in_the_batch(name):
    labels, calls = torch.randperm(12, generator=torch.Generator().manual_seed(3)) % 4, []

    def loss(logits, given, *, rows):
        if name != "vanilla":  # which smooths them
            assert torch.equal(labels[rows % 12], given)
        calls.append(rows)
        return F.cross_entropy(logits, given)

    model = ready()
    step(model, METHODS[name], loss, labels)
    calls.clear()
    out = step(model, METHODS[name], loss, labels)
    if name == "entprop":
        assert any(torch.equal(rows, out.selected) for rows in calls)
    assert calls


def test_a_sum_that_sees_more_is_found_out():
    model = ready(TwoHeads, form=Outputs)
    with pytest.raises(ConfigurationError, match="doubles"):
        step(model, loss=lambda logits, labels, outputs: F.cross_entropy(outputs.aux_logits, labels, reduction="sum"))


def test_another_loss_is_looked_at_as_the_first_was():
    model = ready()
    step(model)
    with pytest.raises(ConfigurationError, match="doubles"):
        step(model, loss=nn.CrossEntropyLoss(reduction="sum"))
    model = ready(TwoHeads, form=Outputs)
    step(model, loss=lambda x, y, outputs: F.cross_entropy(x, y) + F.cross_entropy(outputs.aux_logits, y))
    with pytest.raises(ModelOutputError, match="heads that a loss of the logits does not train"):
        step(model)


def test_a_loss_that_is_the_same_in_each_step_is_looked_at_once():
    calls = []

    def loss(logits, labels):
        calls.append(len(logits))
        return F.cross_entropy(logits, labels)

    model = ready()
    for _ in range(3):
        step(model, loss=lambda logits, labels: loss(logits, labels))  # another function each time
    assert calls.count(2 * len(LABELS)) == 1  # where every image came twice


def test_first_parameters_may_have_any_name():
    step(ready(), loss=lambda outputs, images: F.cross_entropy(outputs, images))


# Binary losses --------------------------------------------------------------------------------------------------------

BCE = nn.BCEWithLogitsLoss()
MULTI_HOT = ((F.one_hot(LABELS, 4) + F.one_hot((LABELS + 1) % 4, 4)) > 0).float()


@pytest.mark.parametrize("name", METHODS)
def test_multi_hot_labels_with_a_binary_loss(name):
    method = Vanilla() if name == "vanilla" else METHODS[name]
    out = step(ready(), method, BCE, MULTI_HOT)
    assert out.loss.isfinite()


def test_multi_hot_labels_with_cross_entropy_are_refused():
    for loss in (None, nn.CrossEntropyLoss()):
        with pytest.raises(LabelError, match=r"BCEWithLogitsLoss\(\)"):
            step(ready(), loss=loss, labels=MULTI_HOT)
    with pytest.raises(LabelError, match=r"in \[0, 1\]"):
        step(ready(), loss=BCE, labels=2 * MULTI_HOT)


class OneLogit(BatchNormNet):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 1)


@pytest.mark.parametrize("name", METHODS)
def test_one_logit_with_a_binary_loss(name):
    method = Vanilla(entropy_weight=0.1) if name == "vanilla" else METHODS[name]
    labels = (LABELS % 2).float()[:, None]
    out = step(ready(OneLogit), method, BCE, labels)
    chance = out.logits.sigmoid()
    entropy = -(chance * chance.log() + (1 - chance) * (1 - chance).log()).flatten()
    torch.testing.assert_close(out.entropy, entropy)
    step(ready(OneLogit), method, lambda logits, labels: BCE(logits[:, 0], labels.float()), LABELS % 2)


def test_one_logit_equals_two_of_which_one_is_zero():
    from entprop_wrap.functional import uncertainty

    logits, labels = torch.randn(6, 1).double(), torch.rand(6, 1).double()
    two, soft = torch.cat([torch.zeros_like(logits), logits], 1), torch.cat([1 - labels, labels], 1)
    for score in (
        uncertainty.entropy,
        uncertainty.least_confidence,
        uncertainty.logit_margin,
        uncertainty.cross_entropy,
    ):
        torch.testing.assert_close(score(logits, labels), score(two, soft))
    torch.testing.assert_close(
        uncertainty.cross_entropy(logits, labels),
        F.binary_cross_entropy_with_logits(logits, labels, reduction="none")[:, 0],
    )


def test_one_logit_with_cross_entropy_is_refused():
    with pytest.raises(ModelOutputError, match=r"BCEWithLogitsLoss\(\)"):
        step(ready(OneLogit), labels=LABELS % 2)


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lagged": True}, {"lagged": True, "auxiliary": None}])
def test_timms_split_batch_norm_is_refused_where_images_are_selected(options):
    timm = pytest.importorskip("timm")
    model = timm.layers.convert_splitbn_model(make(BatchNormNet), num_splits=2)
    model = entprop.wrap(model).train()
    before = state(model)
    with pytest.raises(UnsupportedModelError, match="--split-bn"):
        step(model, entprop.EntProp(fraction=0.5, **options))
    assert same(model, before)


@pytest.mark.parametrize("batch", [12, 24])
def test_jsd_over_splits_is_refused_where_images_are_selected(batch):
    loss = pytest.importorskip("timm.loss").JsdCrossEntropy(num_splits=3)
    images, labels = IMAGES.repeat(batch // 12, 1, 1, 1), LABELS.repeat(batch // 12)
    model = ready()
    before = state(model)
    for given in (loss, lambda logits, labels: loss(logits, labels)):
        with pytest.raises(ConfigurationError, match=r"splits|failed on"):
            step(model, entprop.EntProp(fraction=0.5 if given is loss else 0.4), given, labels, images)
        assert same(model, before)
    with pytest.raises(ConfigurationError, match="splits"):  # all of them, in another order
        step(model, entprop.EntProp(fraction=1, mix=None), loss, labels, images)
    step(model, METHODS["advprop"], loss, labels, images)


# Mixing twice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["entprop", "entprop_auxiliary", "mixprop"])
def test_mixing_what_a_loop_has_mixed_warns_once(name):
    model = ready()
    one_hot = F.one_hot(LABELS, 4).float()
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    with pytest.warns(UserWarning, match="write mix=None"):
        step(model, METHODS[name], labels=0.9 * mixed + 0.025)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Some labels hold")
        step(model, METHODS[name], labels=mixed)
        step(ready(), METHODS[name], labels=0.9 * one_hot + 0.025)  # smoothed
        step(ready(), entprop.EntProp(fraction=0.5, mix=None), labels=mixed)
