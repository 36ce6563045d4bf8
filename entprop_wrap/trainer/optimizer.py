"""From a configuration to the wrapped model's optimizer and its schedule."""

from __future__ import annotations

import inspect
import math
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from entprop_wrap.errors import ConfigurationError, OptimizerMismatchError, UnsupportedModelError
from entprop_wrap.methods.base import Method
from entprop_wrap.trainer.config import TrainerConfig
from entprop_wrap.trainer.run_state import to_python
from entprop_wrap.training import check_trainable
from entprop_wrap.wrapping.model import ensure_wrapped, is_wrapped, unwrap
from entprop_wrap.wrapping.optimizer import check_optimizer, parameter_groups


def wrap_with_optimizer(
    model: nn.Module, method: Method, given: Optimizer | None, config: TrainerConfig, total_steps: int
) -> tuple[Optimizer, LRScheduler]:
    """Wrap ``model`` if ``method`` needs auxiliaries and it is plain; return its optimizer, and that one's schedule.

    After an error the model is as it was.
    """
    wrapped_here = ensure_wrapped(model, method)
    try:
        optimizer = build_optimizer(model, config) if given is None else given
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer expects a torch.optim.Optimizer, found {optimizer!r}. By name: "
                "TrainerConfig(optimizer='sgd')."
            )
        if is_wrapped(model):
            check_optimizer(model, optimizer)
        _check_owner(model, optimizer)
        _check_steps(model, optimizer)
        schedule = build_schedule(optimizer, config, total_steps)
        # A resumed run reads Python's numbers from its checkpoint: this one computes with them, too.
        for options in (*optimizer.param_groups, vars(schedule)):
            options.update({key: to_python(options[key]) for key in options.keys() - {"params", "optimizer"}})
        return optimizer, schedule
    except Exception:
        if wrapped_here:
            unwrap(model)
        raise


def _check_owner(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise where an optimizer holds parameters of something else, which neither processes nor checkpoints share."""
    mine = {id(parameter) for parameter in model.parameters()}
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if others := len(set(held) - mine):
        raise OptimizerMismatchError(
            f"{others} of the optimizer's {len(held)} parameters are not the model's. Write "
            "entprop.parameter_groups(model, weight_decay); a loss that has parameters belongs in the model."
        )


def _check_steps(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise where an optimizer needs more than to step once after the backwards of a training step."""
    kind = type(optimizer).__name__
    arguments = inspect.signature(optimizer.step).parameters.values()
    if any(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in arguments):
        raise UnsupportedModelError(f"{kind} steps with a closure. Choose an optimizer without, such as AdamW.")
    if hasattr(getattr(optimizer, "optimizer", optimizer), "eval"):  # Accelerate's own holds another
        raise UnsupportedModelError(
            f"{kind} has weights for training and others for evaluation. Choose another optimizer, with "
            "ema_decay=0.999 for averaged weights; or write a loop with entprop.TrainingStep."
        )
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"Parameters have hooks that run within backward (found with {kind}), as in layerwise GaLore and APOLLO. A "
            "step has several backwards: choose an optimizer that steps after them."
        )


def build_optimizer(model: nn.Module, config: TrainerConfig) -> Optimizer:
    """Return the optimizer that ``config`` describes, over the parameter groups of ``model``."""
    check_trainable(model)
    decay = config.weight_decay
    groups = parameter_groups(model, (0.05 if config.optimizer == "adamw" else 5e-4) if decay is None else decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    if isinstance(config.optimizer, str):
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=config.learning_rate)
    if decay is None:  # that of a group would override the function's own
        groups = [{key: group[key] for key in group if key == "params" or not group[key]} for group in groups]
    return config.optimizer(groups)


def build_schedule(optimizer: Optimizer, config: TrainerConfig, total_steps: int) -> LRScheduler:
    """Return the schedule that ``config`` describes, for ``total_steps`` steps of ``optimizer``."""
    if not isinstance(config.schedule, str):
        schedule = config.schedule(optimizer, total_steps)
        if not isinstance(schedule, LRScheduler) or isinstance(schedule, ReduceLROnPlateau):
            raise ConfigurationError(
                f"The function given as schedule returned {type(schedule).__name__}. Expected an LRScheduler that "
                "steps once after every optimizer step, without a metric."
            )
        return schedule
    return LambdaLR(optimizer, partial(_factor, config.schedule, round(config.warmup * total_steps), total_steps))


def _factor(name: str, warmup: int, total: int, step: int) -> float:
    """Return what the learning rate is multiplied by in ``step``, counted from 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if name == "linear":
        return 1 - done
    if name == "step":
        return 0.1 ** math.floor(3 * done + 1e-9) if done < 1 else 0.01
    return 1.0
