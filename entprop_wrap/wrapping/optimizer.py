"""The optimizer's side of the copies: parameter groups, and the check that no copy is left untrained."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from entprop_wrap.errors import OptimizerMismatchError, UnsupportedModelError
from entprop_wrap.utils.modules import check_module, plain_model
from entprop_wrap.utils.options import check_function, check_number
from entprop_wrap.wrapping.norm_layers import is_norm
from entprop_wrap.wrapping.registry import Registry, find_registry, living
from entprop_wrap.wrapping.state_dict import auxiliary_names


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay: Callable[[str, nn.Parameter], bool] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters into a group that decays and one that does not, for any torch optimizer.

        optimizer = torch.optim.AdamW(entprop.parameter_groups(model, weight_decay=0.05), lr=3e-4)

    An auxiliary copy goes where the parameter goes that it is a copy of. Order within a group is the model's.

    Args:
        model: Wrapped or plain, in any container.
        weight_decay: Decay of the first group, at least 0.
        no_decay: ``(name, parameter) -> bool`` over the plain model's parameters, True to leave one undecayed. By
            default biases and the parameters of norm layers, as is usual for image models.

    Raises:
        ConfigurationError: ``weight_decay`` is not a finite number of at least 0, or ``no_decay`` not a function.
    """
    check_number("weight_decay", weight_decay, lambda value: value >= 0, "of at least 0")
    if no_decay is not None:
        check_function("no_decay", no_decay, "(name, parameter) -> bool", "no_decay=lambda name, p: p.ndim < 2")
    check_module("parameter_groups()", model)
    model = plain_model(model)
    parameters, originals = dict(model.named_parameters()), auxiliary_names(model)
    if no_decay is None:
        norms = {
            id(parameter) for module in model.modules() if is_norm(module) for parameter in module._parameters.values()
        }

        def no_decay(name: str, parameter: nn.Parameter) -> bool:
            return id(parameter) in norms or name.rsplit(".")[-1] == "bias"

    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            original = originals.get(name, name)
            exempt = no_decay(original, parameters.get(original, parameter))
            (undecayed if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise :class:`OptimizerMismatchError` if ``optimizer`` trains a norm layer but not its auxiliary copy."""
    check_module("check_optimizer()", model)
    if not isinstance(optimizer, Optimizer) and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"check_optimizer() expects a torch optimizer second, found {type(optimizer).__name__}.")
    _check(find_registry(model), optimizer)


#: For each wrapped model the optimizers that have passed the check, and how many groups they had then.
_passed: weakref.WeakKeyDictionary[Registry, weakref.WeakKeyDictionary[Optimizer, int]] = weakref.WeakKeyDictionary()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Check every optimizer against every wrapped model before its first step, and when it was given more groups."""
    for registry in list(living):
        passed = _passed.setdefault(registry, weakref.WeakKeyDictionary())
        if registry.switch.is_differentiating():
            raise UnsupportedModelError(
                "An optimizer stepped inside a backward, as layer-wise GaLore and APOLLO and optimizers on "
                "register_post_accumulate_grad_hook do: a step has several backwards, and their gradients belong "
                "together. Use the optimizer without layer-wise updates, and call optimizer.step() after the step."
            )
        if passed.get(optimizer) != len(optimizer.param_groups):
            _check(registry, optimizer)
            passed[optimizer] = len(optimizer.param_groups)


def _check(registry: Registry, optimizer: Optimizer) -> None:
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    of_norms = [row for row in registry.copied_parameters() if id(row[1]) in trained]
    pairs = [(name, copy) for name, _, copy in of_norms if copy.requires_grad]
    thawed = [(name, copy) for name, norm, copy in of_norms if norm.requires_grad and not copy.requires_grad]
    if still := [name for name, copy in thawed if id(copy) not in trained]:
        raise OptimizerMismatchError(
            f"The optimizer trains {still[0]!r}, whose auxiliary copy is frozen ({len(still)} of {len(of_norms)}). "
            "Thaw norm layers as modules, or by names after wrap(): for name, p in model.named_parameters(). Lists of "
            "parameters from before wrap() hold no copies."
        )
    if missing := [name for name, copy in pairs if id(copy) not in trained]:
        raise OptimizerMismatchError(
            f"The optimizer trains {missing[0]!r} but not its auxiliary copy ({len(missing)} of {len(pairs)} copies "
            "are missing): it was built before wrap(). Write model = entprop.wrap(model) first, then "
            "optimizer = Optimizer(entprop.parameter_groups(model, ...))."
        )


# One hook for all models, never removed: torch iterates over its dictionary of hooks while it calls them. It is here
# from the import on, before those of training steps, whose messages know less of optimizers that step in a backward.
register_optimizer_step_pre_hook(_before_step)
