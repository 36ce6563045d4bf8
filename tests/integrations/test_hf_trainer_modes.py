"""Processes, precision and compilation under the Hugging Face Trainer."""

import importlib
import os

import pytest
import torch

from entprop_wrap import EntProp
from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.wrapping.active_domain import ActiveDomain
from tests.helpers.processes import run_processes
from tests.integrations.hf_trainer_reference import (
    RecordingMixer,
    build,
    by_hand,
    callback,
    counted,
    samples,
    train,
    worst,
)

CLIPPED = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
RUNS = [  # model, options, kind of loss, mixing and several steps
    ("ViT", {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}, "model", False),
    ("ResNet", CLIPPED, "model", False),
    ("ViT", {**CLIPPED, "label_smoothing_factor": 0.1}, "smoothed", True),
    ("ResNet", {**CLIPPED, "compute_loss_func": counted}, "counted", True),
    ("ConvNext", CLIPPED, "model", True),
]


def train_rank(rank, folder):
    os.environ.update(MASTER_ADDR="localhost", ACCELERATE_USE_CPU="true")
    results = []
    for name, options, _, mixing in RUNS:
        mixer = RecordingMixer() if mixing else None
        trainer, batches, gradients = train(
            build(name),
            callback(EntProp(fraction=0.5, mix=mixer)),
            folder,
            data=samples(32),
            ddp_backend="gloo",
            max_steps=2 if mixing else 1,
            **options,
        )
        assert trainer.accelerator.num_processes == 2
        logs = [log for log in trainer.state.log_history if "loss" in log]
        results.append((batches, gradients, logs, mixer.draws if mixing else None))
    return results


def test_two_processes(tmp_path):
    """A loop by hand over the batches of both; gradients are the mean of theirs."""
    ranks = run_processes(train_rank, str(tmp_path))
    for (name, options, loss_kind, mixing), *results in zip(RUNS, *ranks, strict=True):
        accumulate = options["gradient_accumulation_steps"]
        steps = 2 if mixing else 1

        def in_turn(values, accumulate=accumulate, steps=steps):
            parts = [slice(step * accumulate, (step + 1) * accumulate) for step in range(steps)]
            return [value for part in parts for rank in values for value in rank[part]]

        expected, _, _ = by_hand(
            name,
            build(name),
            in_turn([batches for batches, _, _, _ in results]),
            accumulate,
            draws=in_turn([draws for _, _, _, draws in results]) if mixing else None,
            clip=options.get("max_grad_norm", 0.0),
            smoothing=options.get("label_smoothing_factor", 0.0),
            loss_kind=loss_kind,
            processes=2,
        )
        for _, gradients, logs, _ in results:
            assert worst(gradients, expected) < 5e-4, (name, options)
            assert logs[0]["aux_entropy"] == results[0][2][0]["aux_entropy"]


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_bf16(name, tmp_path):
    try:
        _, batches, found = train(
            build(name),
            callback(),
            tmp_path,
            bf16=True,
            max_steps=1,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=8,
        )
    finally:
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # 4.57 leaves it behind for the next Trainer
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
    expected, _, _ = by_hand(name, build(name), batches[:2], 2, bf16=True)
    assert worst(found, expected) < 0.02  # a rounding of bf16 is 0.004
    full, _, _ = by_hand(name, build(name), batches[:2], 2)
    assert worst(found, full) > 0.005  # it was bf16


def test_torch_compile(tmp_path):
    trainer, batches, found = train(
        build("ResNet"),
        callback(),
        tmp_path,
        torch_compile=True,
        torch_compile_backend="eager",
        gradient_accumulation_steps=2,
        label_smoothing_factor=0.1,
        max_steps=1,
    )
    expected, _, _ = by_hand("ResNet", build("ResNet"), batches[:2], 2, smoothing=0.1, loss_kind="smoothed")
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert worst(found, expected) < 5e-4
    os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)


def test_the_recompile_limit_is_named_where_a_recomputed_norm_knows_no_domain():
    """Where dynamo has given up on the model, nothing says whose backward it is; that takes minutes to bring about."""
    output = torch.ones(1, requires_grad=True) * 2
    output.register_hook(lambda _: ActiveDomain().resolve())
    expected = r"write torch\._dynamo\.config\.recompile_limit = 64 \(cache_size_limit in torch 2\.6"
    with pytest.raises(UnsupportedModelError, match=expected):
        output.backward()
    config = importlib.import_module("torch._dynamo.config")
    assert hasattr(config, "recompile_limit") or (torch.__version__ < "2.7" and hasattr(config, "cache_size_limit"))
