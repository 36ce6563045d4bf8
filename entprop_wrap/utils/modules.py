"""Containers that other libraries put around a model: DDP, FSDP, ``torch.compile``, DataParallel, DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from entprop_wrap.errors import UnsupportedModelError


def check_module(caller: str, model: object) -> None:
    """Raise :class:`UnsupportedModelError` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{caller}: expected a torch.nn.Module, found {type(model).__name__}.")


def walk(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module once; several times faster than ``modules()``, which builds names too."""
    seen: set[int] = set()
    stack: list[nn.Module] = [model]
    while stack:
        module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            stack.extend([child for child in module._modules.values() if child is not None])


#: Moving averages of timm, by class name, so that it need not be importable.
_AVERAGES = frozenset({"ModelEmaV2", "ModelEmaV3"})


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model inside compile, data-parallel and averaging containers (FSDP2 has none: it shards in place)."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, AveragedModel)) or type(model).__name__ in _AVERAGES:
            model = model._modules["module"]  # type: ignore[assignment]
        elif (compiled := model._modules.get("_orig_mod")) is not None:
            model = compiled
        else:
            return model


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Have all modules in evaluation mode inside the with-block, and as they were afterwards."""
    return all_evaluating(walk(model))


@contextmanager
def all_evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have just these ``modules`` in evaluation mode inside the with-block, and as they were afterwards."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def no_gradient_sync(model: nn.Module) -> AbstractContextManager[object]:
    """Return DDP's ``no_sync()``, entered around forward *and* backward; a null context for everything else.

    FSDP2 reduces each backward into the sharded gradient, so two backwards are right as they are.
    """
    *_, inside = _containers(model)
    return inside.no_sync() if isinstance(inside, nn.parallel.DistributedDataParallel) else nullcontext()


#: Containers whose training step cannot be split, by class name, and why.
_NO_STEP = {
    "DeepSpeedEngine": "DeepSpeed steps its engine at every synchronised backward: two would be two steps.",
    "FullyShardedDataParallel": "FSDP1 flattens parameters, and its hooks expect one backward a step.",
}


def _containers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model and what is compiled in it."""
    inside: nn.Module | None = model
    while inside is not None:
        yield inside
        inside = inside._modules.get("_orig_mod")


def refuse_container(model: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` if ``model`` is in a container in which a step of ours cannot be right."""
    for inside in _containers(model):
        if why := _NO_STEP.get(type(inside).__name__):
            raise UnsupportedModelError(
                f"{why} Expected a plain, DDP or FSDP2 model: choose one of these with `accelerate config`, or write "
                "torch.distributed.fsdp.fully_shard(model)."
            )


def refuse_static_graph(model: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` if ``model`` is in a DDP that expects the same graph in every pass."""
    if any(isinstance(m, nn.parallel.DistributedDataParallel) and m.static_graph for m in _containers(model)):
        raise UnsupportedModelError(
            "DDP expects the same graph in every pass, and each domain has its own. Leave out static_graph=True."
        )


def refuse_sharded(caller: str, model: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` if a parameter is sharded."""
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{caller} expects a whole model, found a sharded one: call it before fully_shard(), or choose DDP."
        )


def refuse_wrapping(model: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` if ``model`` is compiled, scripted, distributed, or holds such a part."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.DataParallel):
            fix = "It copies the model without its copies: use `accelerate launch` or torchrun, one process per GPU."
        elif isinstance(module, torch.jit.ScriptModule):
            fix = "Wrap the Python model; TorchScript can be made from it after entprop.unwrap(model)."
        elif isinstance(module, nn.parallel.DistributedDataParallel) or kind in _NO_STEP or _is_fsdp2(module):
            fix = "Call entprop.wrap(model) first, then use DDP or FSDP2."
        elif "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            fix = "Write torch.compile(entprop.wrap(model)): wrap, then compile."
        else:
            continue
        where = f"the part {name!r} of the model" if name else "the model"
        raise UnsupportedModelError(f"wrap() expected a plain module; {where} is a {kind}. {fix}")


def _is_fsdp2(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


@contextmanager
def replaced(values: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    """Give a dictionary, such as ``vars(object)``, another value inside the with-block; the order of keys stays."""
    missing, before = key not in values, values.get(key)
    values[key] = value
    try:
        yield
    finally:
        values[key] = before
        if missing:
            del values[key]
