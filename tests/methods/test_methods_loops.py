"""Every method inside other people's loops: passes, accumulation, bf16, the fp16 gradient scaler."""

import itertools

import pytest
import torch

import entprop_wrap as entprop
from entprop_wrap import EntProp, MixUp
from entprop_wrap.functional import CutMix, uncertainty
from entprop_wrap.functional.attacks import PGD
from entprop_wrap.methods import (
    MEADA,
    AdversarialTraining,
    AdvProp,
    EntropyAscent,
    FastAdvProp,
    FineGrainedAdvProp,
    MixProp,
    Vanilla,
)
from entprop_wrap.methods.entropic_retraining import EntropicRetraining
from tests.methods.loops import (
    Counter,
    assert_close,
    distance,
    distance_under_autocast,
    gradients,
    plain_gradients,
    wrapped,
)
from tests.reference.models import random_batch

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

BATCH = 10
ATTACK = PGD(epsilon=4 / 255, steps=3, step_size=1 / 255)


def fixed_start(**options):
    """An attack that draws nothing: two runs of it differ by their gradients alone."""
    return PGD(**{"epsilon": 2 / 255, "steps": 2, "random_start": False, **options})


def model_for(method, kind="batch_norm", dtype=torch.float64):
    """A model wrapped as the method wants it."""
    return wrapped(kind, dtype, auxiliaries=method.auxiliaries or ("aux",))


BRANCHES = {"weak": PGD(1 / 255, steps=1), "strong": ATTACK, "dark": lambda pixels: pixels / 2}

METHODS = {
    # name: (method, forward passes in images, calls of backward, StepOutput.passes by the formula in the docstring)
    "vanilla": (Vanilla(), [10], 1, 1),
    "vanilla, regularised": (Vanilla(label_smoothing=0.1, entropy_weight=0.1), [10], 1, 1),
    # One pass per attack step: neither mixing nor the first attack step adds any.
    "entprop, still": (EntProp(fraction=0.4, attack_steps=0, mix=None), [10, 4], 2, 1 + 0.4),
    "entprop": (EntProp(fraction=0.4, mix=MixUp()), [10, 4], 2, 1 + 0.4),
    "entprop, sum": (EntProp(fraction=0.4, mix=CutMix(), weighting="sum"), [10, 4], 2, 1 + 0.4),
    "entprop, auxiliary": (EntProp(fraction=0.4, mix_on="auxiliary", attack_steps=3), [10, 4, 4, 4], 2, 1 + 0.4 * 3),
    "random selection": (EntProp(uncertainty=uncertainty.random, attack_steps=3), [10, 2, 2, 2], 2, 1 + 0.2 * 3),
    "shared norms": (EntProp(auxiliary=None, attack_steps=3), [10, 2, 2, 2], 2, 1 + 0.2 * 3),
    "mixprop": (MixProp(), [10, 10], 2, 2),
    "advprop": (AdvProp(attack=ATTACK), [10] * 5, 2, 2 + 3),
    "advprop, targeted, batch": (AdvProp(ATTACK, targeted=True, attack_statistics="batch"), [10] * 5, 2, 2 + 3),
    "fine-grained": (FineGrainedAdvProp(BRANCHES, {"weak": 1, "strong": 0.5, "dark": 2}), [10] * 8, 4, 1 + 2 + 4 + 1),
    "fast advprop": (FastAdvProp(), [8, 2, 2], 3, 1 + 0.2),
    "fast advprop, half": (FastAdvProp(fraction=0.5, beta=0.4), [5, 5, 5], 3, 1 + 0.5),
    "me-ada": (MEADA(), [10] * 17, 2, 1 + 16),
    "me-ada, part": (MEADA(EntropyAscent(steps=3), fraction=0.4), [10, 4, 4, 4, 4], 2, 1 + 0.4 * 4),
    "entropic retraining": (EntropicRetraining(), [10], 1, 1),
    "pgd": (AdversarialTraining(ATTACK), [10] * 4, 1, 3 + 1),
    "pgd, clean": (AdversarialTraining(ATTACK, clean_weight=0.5, entropy_weight=0.1), [10] * 5, 2, 3 + 2),
    "trades": (AdversarialTraining(ATTACK, kind="trades"), [10] * 5, 1, 3 + 2),
}
MAIN_ONLY = [name for name, (method, *_) in METHODS.items() if not method.auxiliaries]


@pytest.mark.parametrize("name", METHODS)
def test_passes_losses_and_statistics(name):
    method, passes, calls, cost = METHODS[name]
    model = model_for(method, "mixed_norms")
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    counter, trained, losses = Counter(model), [], []
    model.register_forward_pre_hook(lambda module, args: trained.append(torch.is_grad_enabled()))

    def backward(loss):
        losses.append(loss.item())
        counter.backward(loss)

    out = entprop.training_step(model, *random_batch(BATCH), method=method, backward=backward)

    # TRADES asks the model once, without a backward, what it predicts as it is
    without_backward = [size for size, needed in zip(counter.forwards, trained, strict=True) if not needed]
    assert without_backward == ([BATCH] if "trades" in name else [])
    assert sorted(counter.forwards) == sorted(passes + without_backward)
    assert sorted(counter.backwards) == sorted(passes)
    assert counter.calls == calls
    assert out.passes == pytest.approx(cost)
    assert out.passes == pytest.approx(sum(passes) / BATCH)

    assert out.loss.item() == pytest.approx(sum(losses), rel=1e-12)
    if name.startswith("entprop"):
        weight = 1.0 if "sum" in name else 0.4
        assert losses == pytest.approx([out.main_loss.item(), weight * out.aux_loss.item()], rel=1e-12)

    recorded = {  # once for every pass that trains
        part: {
            (buffer - before[key]).item()
            for key, buffer in model.named_buffers()
            if key.endswith("num_batches_tracked") and ("entprop_" in key) == (part == "aux")
        }
        for part in ("main", "aux")
    }
    both = "trades" in name or name in ("pgd, clean", "shared norms")
    assert recorded["main"] == {2 if both else 1}
    assert recorded["aux"] == {0 if name in MAIN_ONLY else 2 if isinstance(method, FastAdvProp) else 1}
    for module in model.modules():
        assert module.training, f"{type(module).__name__} is left in evaluation mode"


@pytest.mark.parametrize("name", METHODS)
def test_accumulated_gradients_are_the_sum_of_the_steps(name):
    method = METHODS[name][0]
    model, singles = model_for(method, "layer_norm"), []
    for seed in range(2):
        batch = random_batch(BATCH, seed=seed)
        torch.manual_seed(seed)
        entprop.training_step(model, *batch, method=method, backward=lambda loss: (loss / 2).backward())
        torch.manual_seed(seed)
        singles.append(plain_gradients(batch, kind="layer_norm", method=method))
    assert_close(gradients(model), {key: (singles[0][key] + singles[1][key]) / 2 for key in singles[0]}, 1e-12)


@pytest.mark.parametrize("name", MAIN_ONLY)
def test_a_main_only_method_leaves_the_copies_alone_and_needs_none(name):
    found = []
    for model in (wrapped(), entprop.unwrap(wrapped())):
        torch.manual_seed(0)
        entprop.training_step(model, *random_batch(BATCH), method=METHODS[name][0])
        found.append(gradients(model))
    assert_close(found[0], found[1], 0.0)


# Half precision -------------------------------------------------------------------------------------------------------

SMOOTH = ("layer_norm", "group_norm", "mixed_norms")  # a ReLU that rounding flips is far away, and rightly so
HALF = {
    "vanilla": Vanilla(label_smoothing=0.1, entropy_weight=0.1),
    "entprop": EntProp(fraction=0.4, mix=None, uncertainty=uncertainty.random, attack_steps=3),
    "shared norms": EntProp(auxiliary=None, uncertainty=uncertainty.random, attack_steps=2, mix=None),
    "mixprop": MixProp(),
    "advprop": AdvProp(fixed_start()),
    "advprop, batch": AdvProp(fixed_start(), attack_statistics="batch"),
    "fine-grained": FineGrainedAdvProp({"attacked": fixed_start(), "dark": BRANCHES["dark"]}),
    "fast advprop": FastAdvProp(fraction=0.4),
    "me-ada": MEADA(EntropyAscent(steps=2), weight=0.5),
    "entropic retraining": EntropicRetraining(),
    "pgd": AdversarialTraining(fixed_start(), clean_weight=0.3, entropy_weight=0.1, label_smoothing=0.1),
    "trades": AdversarialTraining(PGD(epsilon=2 / 255, steps=2), kind="trades", beta=1.0),
}


@pytest.mark.parametrize(("name", "kind"), list(zip(HALF, itertools.cycle(SMOOTH), strict=False)))
def test_half_precision_and_scaled_losses_are_close_to_float32(name, kind):
    batch, method = random_batch(32, dtype=torch.float32), HALF[name]
    torch.manual_seed(0)
    expected = plain_gradients(batch, kind=kind, dtype=torch.float32, method=method)
    torch.manual_seed(0)
    found = plain_gradients(batch, kind=kind, dtype=torch.float32, method=method, amp=torch.bfloat16)
    assert 0 < distance(found, expected) < 3 * distance_under_autocast(kind, torch.bfloat16)

    for amp in (None, torch.float16):
        model = model_for(method, kind, torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        torch.manual_seed(0)
        with torch.autocast("cpu", amp, enabled=amp is not None):
            entprop.training_step(
                model, *batch, method=method, backward=lambda loss, scaler=scaler: scaler.scale(loss).backward()
            )
        scaler.unscale_(optimizer)
        if amp is None:
            assert_close(gradients(model), expected, 1e-5)
        else:
            assert 0 < distance(gradients(model), expected) < 3 * distance_under_autocast(kind, amp)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**10
        assert not all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
