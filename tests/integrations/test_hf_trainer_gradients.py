"""Gradients of the Hugging Face Trainer with the callback against a hand-written loop."""

import pytest
import torch

from entprop_wrap import EntProp, auxiliary_state_dict
from entprop_wrap.methods import Vanilla
from tests.integrations.hf_trainer_reference import (
    CONFIGURATIONS,
    RecordingMixer,
    averaged,
    build,
    by_hand,
    callback,
    counted,
    train,
    worst,
)

CASES = [
    *((name, {"gradient_accumulation_steps": 4}, "model", 0) for name in CONFIGURATIONS),
    ("ViT", {}, "model", 1),
    *((name, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}, "model", 1) for name in CONFIGURATIONS),
    ("ViT", {"gradient_accumulation_steps": 4, "label_smoothing_factor": 0.1}, "smoothed", 1),
    ("ResNet", {"gradient_accumulation_steps": 4, "label_smoothing_factor": 0.1}, "smoothed", 1),
    ("ConvNext", {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}, "smoothed", 0),
    ("ViT", {"gradient_accumulation_steps": 4, "compute_loss_func": counted}, "counted", 1),
    ("ResNet", {"gradient_accumulation_steps": 4, "compute_loss_func": counted}, "counted", 0),
    ("ViT", {"gradient_accumulation_steps": 2, "compute_loss_func": averaged}, "mean", 1),
    ("ConvNext", {"gradient_accumulation_steps": 2, "compute_loss_func": averaged}, "mean", 0),
    ("ViT", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, "model", 1),
    ("ViT", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "model", 1),
]


def name_of(value):
    return "-".join(f"{k}={getattr(v, '__name__', v)}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize(("name", "options", "loss_kind", "mixing"), CASES, ids=name_of)
def test_gradients_equal_a_loop_by_hand(name, options, loss_kind, mixing, tmp_path):
    mixer = RecordingMixer() if mixing else None
    added = callback(EntProp(fraction=0.5, mix=mixer))
    trainer, batches, found = train(build(name), added, tmp_path, **options)
    expected, model, other = by_hand(
        name,
        build(name),
        batches,
        options.get("gradient_accumulation_steps", 1),
        draws=mixer.draws if mixer else None,
        clip=options.get("max_grad_norm", 0.0),
        smoothing=options.get("label_smoothing_factor", 0.0),
        loss_kind=loss_kind,
    )
    assert worst(found, expected) < 5e-4
    copies = auxiliary_state_dict(trainer.model)
    main = trainer.model.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(main[key], value, rtol=1e-4, atol=1e-5)
    other = other.state_dict()
    for key, value in copies.items():
        torch.testing.assert_close(value, other[key.replace("entprop_aux.", "")], rtol=1e-4, atol=1e-5)


PLAIN = [
    ("ViT", {"gradient_accumulation_steps": 4}),
    ("ResNet", {"gradient_accumulation_steps": 4, "max_grad_norm": 0.05}),
    ("Beit", {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), PLAIN, ids=name_of)
def test_vanilla_training_is_what_the_trainer_does_alone(name, options, tmp_path):
    alone, _, expected = train(build(name), None, tmp_path, **options)
    trainer, _, found = train(build(name), callback(Vanilla()), tmp_path, **options)
    assert worst(found, expected) < 1e-5
    torch.testing.assert_close(trainer.model.state_dict(), alone.model.state_dict(), rtol=1e-5, atol=1e-6)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (alone, trainer)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
