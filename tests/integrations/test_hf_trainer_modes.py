"""Processes, precision and compilation under the Hugging Face Trainer."""

import os

import pytest
import torch
from transformers import Trainer

from entprop_wrap import EntProp
from entprop_wrap.integrations.hf_trainer import EntPropCallback
from tests.distributed import run_processes
from tests.integrations.hf_trainer_reference import (
    OLD,
    SPACE,
    RecordBatches,
    RecordGradients,
    arguments,
    build,
    by_hand,
    samples,
    train,
    worst,
)

METHOD = EntProp(fraction=0.5, mix=None)


RUNS = [
    ("ViT", {"gradient_accumulation_steps": 1}),
    ("ViT", {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}),
    ("ResNet", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}),
    ("ResNet", {"gradient_accumulation_steps": 1, "ddp_find_unused_parameters": False}),
]


def train_rank(rank, folder):
    os.environ.update(MASTER_ADDR="localhost", ACCELERATE_USE_CPU="true")
    results = []
    for name, options in RUNS:
        batches, gradients = RecordBatches(), RecordGradients()
        trainer = Trainer(
            model=build(name),
            args=arguments(folder, ddp_backend="gloo", max_steps=1, **options),
            train_dataset=samples(32),
            data_collator=batches,
            callbacks=[EntPropCallback(METHOD, pixel_space=SPACE), gradients],
        )
        trainer.train()
        assert trainer.accelerator.num_processes == 2
        logs = [log for log in trainer.state.log_history if "loss" in log]
        results.append((batches.batches, gradients.steps, logs))
    return results


def test_two_processes(tmp_path):
    """Every process runs the loop by hand on its own batches; gradients are the mean of theirs."""
    ranks = run_processes(train_rank, str(tmp_path))
    for (name, options), *results in zip(RUNS, *ranks, strict=True):
        accumulate = options["gradient_accumulation_steps"]
        by_rank = [by_hand(name, build(name), batches[:accumulate], accumulate)[0][0] for batches, _, _ in results]
        expected = {n: processes_factor(name) * (by_rank[0][n] + by_rank[1][n]) / 2 for n in by_rank[0]}
        if clip := options.get("max_grad_norm"):
            norm = torch.cat([v.flatten() for v in expected.values()]).norm()
            expected = {n: v * min(1.0, clip / (float(norm) + 1e-6)) for n, v in expected.items()}
        for _, gradients, logs in results:
            assert worst(gradients, [expected]) < 5e-4
            assert logs[0]["aux_entropy"] == results[0][2][0]["aux_entropy"]


def processes_factor(name):
    """What the Trainer makes of the mean over two processes, with equal batches (evidence, section 2)."""
    return 2.0 if name == "ResNet" and not OLD else 1.0


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_bf16(name, tmp_path):
    try:
        _, batches, found = train(
            build(name),
            EntPropCallback(METHOD, pixel_space=SPACE),
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


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_torch_compile(name, tmp_path):
    trainer, batches, found = train(
        build(name),
        EntPropCallback(METHOD, pixel_space=SPACE),
        tmp_path,
        torch_compile=True,
        torch_compile_backend="aot_eager",
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    expected, _, _ = by_hand(name, build(name), batches[:2], 2)
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert worst(found, expected) < 5e-4
    os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
