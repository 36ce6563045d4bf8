"""ME-ADA as it is published for CIFAR: training in phases, after each of which the data has doubled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.methods import grow
from entprop_wrap.trainer import Trainer, TrainerConfig

__all__ = ["fit", "phases_of"]


def phases_of(epochs: int) -> tuple[int, ...]:
    """Return the epochs of each phase: twice a tenth of all, and the rest."""
    every = max(1, epochs // 10)
    if epochs <= 2 * every:
        raise ConfigurationError(f"me_ada_growth trains in three phases, found {epochs} epochs: choose more epochs.")
    return every, every, epochs - 2 * every


def fit(
    model: nn.Module,
    data: Any,
    eval_data: Any = None,
    *,
    phases: Sequence[int],
    config: TrainerConfig,
    resume: bool = False,
    **options: Any,
) -> Trainer:
    """Train as long as each of the phases says, all but the last in folders of their own; return the last Trainer.

    Each phase has a schedule of its own. A phase that was finished is not trained again when it is resumed; what the
    data has grown after it is made again.
    """
    output = Path(config.output_dir)
    for phase, epochs in enumerate(phases, start=1):
        last = phase == len(phases)
        own = replace(config, epochs=epochs, output_dir=output if last else output / f"phase{phase}")
        trainer = Trainer(model, data, eval_data, config=own, **options)
        trainer.fit(resume=resume)
        if not last:
            data = grow(
                model,
                data,
                pixel_space=options.get("pixel_space"),
                workers=config.workers,
                progress=config.progress,
            )
    return trainer
