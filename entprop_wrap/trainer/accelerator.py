"""The Accelerator of a training run, and the traces that it leaves on a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import nn
from torch.optim import Optimizer

from entprop_wrap.errors import ConfigurationError, UnsupportedModelError
from entprop_wrap.trainer.config import TrainerConfig
from entprop_wrap.trainer.run_identity import describe


def make_accelerator(config: TrainerConfig) -> Accelerator:
    """Return an Accelerator for ``config``: this process alone, or one of those that ``accelerate launch`` started.

    Accelerate keeps one precision per Python process. Trainers may differ: the shared part is made anew for each.
    """
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise ConfigurationError(f"accelerate launch says mixed_precision={precision!r}. Write 'no', 'bf16' or 'fp16'.")
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if accumulation not in ("auto", "1", str(config.gradient_accumulation_steps)):
        raise ConfigurationError(
            f"accelerate launch says gradient_accumulation_steps={accumulation}, the configuration "
            f"{config.gradient_accumulation_steps}. Write TrainerConfig(gradient_accumulation_steps={accumulation})."
        )
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        # There is no public way; without it, Accelerate refuses a second precision.
        AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        mixed_precision=precision,
        # The Trainer itself groups batches: Accelerate would divide a last, smaller group by the full number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=config.log_with,
        project_dir=str(config.output_dir),
    )
    if (started := os.environ.get("WORLD_SIZE", "1")) not in ("1", str(accelerator.num_processes)):
        raise ConfigurationError(
            f"{started} processes were started (WORLD_SIZE), and Accelerate sees {accelerator.num_processes}. On the "
            "CPU set ACCELERATE_USE_CPU=true, or write `accelerate launch --cpu`."
        )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigurationError("mixed_precision='fp16' needs an accelerator. On the CPU write 'bf16' or 'no'.")
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UnsupportedModelError(f"{kind.value} steps inside backward. Choose DDP or FSDP2: `accelerate config`.")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UnsupportedModelError("FSDP1 flattens parameters. Choose fsdp_version: 2 with `accelerate config`.")
    if kind == DistributedType.FSDP and (config.save_every is not None or config.ema_decay is not None):
        raise UnsupportedModelError(
            "Checkpoints and moving averages of sharded models are not supported. Write TrainerConfig(save_every=None, "
            "ema_decay=None); the model is exported at the end of fit()."
        )
    return accelerator


@contextmanager
def trackers(accelerator: Accelerator, config: TrainerConfig, **more: Any) -> Iterator[None]:
    """Have the trackers of ``config`` run inside the with-block, told all options and ``more``."""
    if config.log_with is not None:
        options = {**more, **vars(config)}
        simple = {name: v if isinstance(v, (int, float, str)) else describe(v) for name, v in options.items()}
        accelerator.init_trackers(config.project, config=simple)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []  # accelerator.end_training() would close the process group as well


class Prepared:
    """A model in its DDP, FSDP2 or compiled container, if any, and its optimizer, as Accelerate runs them.

    Accelerate sets attributes on the model, among them a ``forward`` for mixed precision. They are there while the
    model runs and gone outside, so that the model in the user's hands stays what it was.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, *, compile: bool) -> None:
        self.precision = accelerator.mixed_precision
        self._device = accelerator.device.type
        self._plain = model
        before = set(model.__dict__)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if compile and not hasattr(self.model, "_orig_mod"):
            self.model = torch.compile(self.model)
        self._attributes = {name: model.__dict__.pop(name) for name in set(model.__dict__) - before}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have Accelerate's attributes on the model inside the with-block."""
        missing = self._attributes.keys() - self._plain.__dict__.keys()  # none, where nested
        self._plain.__dict__.update({name: self._attributes[name] for name in missing})
        try:
            yield
        finally:
            for name in missing:
                self._plain.__dict__.pop(name, None)

    def autocast(self) -> Any:
        """Return the autocast context of this precision, for a model that Accelerate has not prepared."""
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return torch.autocast(self._device, dtype=types.get(self.precision), enabled=self.precision in types)
