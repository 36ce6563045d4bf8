"""Norm layers and how they are found: one rule, its exceptions by name, and the user's ``include`` and ``exclude``."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy
from torch.nn.utils import parametrize

from entprop_wrap.errors import ConfigurationError, NoNormLayersError, UnsupportedModelError
from entprop_wrap.utils.options import shown
from entprop_wrap.wrapping.switched_norm import AuxiliaryNorm

#: A class of modules, a glob over qualified names (``"blocks.*.norm1"``), or ``predicate(name, module) -> bool``.
Selector = type[nn.Module] | str | Callable[[str, nn.Module], bool]

_BASES = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_SELECTORS = "Give a module class, a glob over the names of model.named_modules(), or a predicate (name, module)."

# Named like a norm, or close to one, and yet none: GRN is a gate on channel energy, NormFreeBlock a whole residual
# block. Compared by name, so that neither timm nor transformers has to be importable.
_NOT_NORMS = frozenset({"GlobalResponseNorm", "ConvNextV2GRN", "NormFreeBlock"})


def is_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is a norm layer whose state is worth an auxiliary copy.

    A norm is a subclass of torch's batch, instance, layer, group or RMS norm, or a class with vectors for parameters
    that has a buffer ``running_mean``, or is named ``*norm*`` and contains no layer with weights (that would be a
    block). Linear layers and convolutions with normalised weights are not norms. It must have state that training
    moves: a parameter, or running statistics. ``FrozenBatchNorm2d`` and norms without affine weights have none.

    Only a module's own tensors count, and ``requires_grad`` does not: a frozen norm may be thawed after ``wrap``.
    """
    names = {cls.__name__ for cls in type(module).__mro__}
    if names & _NOT_NORMS or isinstance(module, AuxiliaryNorm):
        return False
    parameters = any(value is not None for value in module._parameters.values())
    records = module._buffers.get("running_mean") is not None
    if isinstance(module, _BASES):
        return parameters or records
    named = "norm" in type(module).__name__.lower() and not _has_weighted_child(module)
    if not (named or records) or isinstance(module, (nn.Linear, _ConvNd)):  # records: InPlaceABN, F.batch_norm
        return False
    moves = parameters or (records and "weight" not in module._buffers)  # FrozenBatchNorm2d has a buffer
    return moves and not _has_matrix(module)


def find_norms(
    model: nn.Module,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> dict[str, nn.Module]:
    """Map qualified names to the norm layers of ``model``, in the order of ``named_modules()``.

    ``include`` selects modules in addition to those that :func:`is_norm` recognises; ``exclude`` wins over it.
    """
    modules = dict(model.named_modules())
    included = _matches(modules, _selectors(include, "include"), "include")
    excluded = _matches(modules, _selectors(exclude, "exclude"), "exclude")
    if stateless := [name for name in included if not _own_tensors(modules[name])]:
        raise ConfigurationError(
            f"include= must name modules that own parameters or buffers; these own none: {_some(stateless)}. "
            "Name the norm layer itself rather than the block around it."
        )
    recognised = [name for name, module in modules.items() if is_norm(module)]
    wanted = included.union(recognised) - excluded
    chosen = {name: module for name, module in modules.items() if name in wanted}
    if not chosen:
        raise NoNormLayersError(_why_none(model, modules, recognised))
    return chosen


def _own_tensors(module: nn.Module) -> list[object]:
    return [value for value in (*module._parameters.values(), *module._buffers.values()) if value is not None]


def _has_matrix(module: nn.Module) -> bool:
    # (1, C, 1, 1) is a vector in the layout of images; a cosine classifier has a weight for each class and feature.
    own = (parameter for parameter in module._parameters.values() if parameter is not None)
    return any(sum(size > 1 for size in parameter.shape) > 1 for parameter in own if not is_lazy(parameter))


def _has_weighted_child(module: nn.Module) -> bool:
    # A fused activation such as PReLU has a vector of weights at most; a convolution or a linear layer has a matrix.
    # The copies of a wrapped norm have the shapes of its own weights.
    children = [child for child in module.children() if not isinstance(child, AuxiliaryNorm)]
    return any(parameter.ndim > 1 for child in children for parameter in child.parameters())


def _selectors(value: Selector | Iterable[Selector] | None, argument: str) -> list[Selector]:
    if value is None:
        return []
    single = isinstance(value, (str, type)) or callable(value) or not isinstance(value, Iterable)
    single = single or getattr(value, "ndim", 1) == 0  # an array that is a number
    selectors: list[Any] = [value] if single else list(value)  # type: ignore[arg-type]
    if not selectors and argument == "include":
        raise ConfigurationError(
            "include= is empty: it names modules to copy besides the norm layers recognised. Leave it out to copy just "
            "these, or name those to leave shared with exclude=."
        )
    for selector in selectors:
        if isinstance(selector, nn.Module) or not (isinstance(selector, str) or callable(selector)):
            raise ConfigurationError(f"{argument}= holds {shown(selector)}, which selects nothing. {_SELECTORS}")
    return selectors


def _matches(modules: dict[str, nn.Module], selectors: list[Selector], argument: str) -> set[str]:
    found: set[str] = set()
    for selector in selectors:
        if isinstance(selector, str):
            hits = set(fnmatch.filter(modules, selector))
        elif isinstance(selector, type):
            hits = {name for name, module in modules.items() if isinstance(module, selector)}
        else:
            hits = {name for name, module in modules.items() if selector(name, module)}
        if not hits:
            near = difflib.get_close_matches(str(selector), modules, n=3) if isinstance(selector, str) else []
            hint = f" Close names: {', '.join(near)}." if near else ""
            raise ConfigurationError(f"{argument}={selector!r} matches no module of the model.{hint} {_SELECTORS}")
        found |= hits
    return found


def _why_none(model: nn.Module, modules: dict[str, nn.Module], recognised: list[str]) -> str:
    kind = type(model).__name__
    if recognised:
        return f"exclude= removes all {len(recognised)} norm layers of {kind}: {_some(recognised)}."
    if gates := [name for name, module in modules.items() if type(module).__name__ in _NOT_NORMS]:
        return (
            f"{kind} has no norm layer, only {type(modules[gates[0]]).__name__} ({_some(gates)}), which is not a norm "
            "by default. Pass include= to copy it all the same."
        )
    stateless = [name for name, module in modules.items() if "norm" in type(module).__name__.lower()]
    if stateless:
        return (
            f"The norm layers of {kind} have no state that training moves ({_some(stateless)}): frozen, or without "
            "affine weights and running statistics. Use affine=True, or replace frozen norms before wrap()."
        )
    return (
        f"{kind} has no norm layer (AlexNet, VGG, SqueezeNet and normaliser-free nets have none). Use a variant with "
        "norms, such as vgg16_bn, or name other modules to copy with include=."
    )


def refuse_untouchable(norms: dict[str, nn.Module], names: list[str]) -> None:
    """Raise :class:`UnsupportedModelError` if norms cannot be switched, or have one of the ``names`` of copies."""
    problems = []
    for name, module in norms.items():
        if parametrize.is_parametrized(module):
            problems.append(f"{name} is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first")
        elif computed := _computed_tensors(module):
            problems.append(
                f"{name} computes its {computed[0]} from other tensors (pruning, weight or spectral norm): make it "
                "permanent first, for example with torch.nn.utils.prune.remove"
            )
        elif any(isinstance(tensor, (UninitializedBuffer, UninitializedParameter)) for tensor in _own_tensors(module)):
            problems.append(f"{name} is lazy and not initialised yet: run one forward pass first")
        elif "forward" in module.__dict__:
            problems.append(f"{name!r} has a forward() set on the instance (a patched kernel): wrap the model before")
        elif any(hasattr(module, taken) for taken in names):
            problems.append(f"{name!r} already has an attribute named after an auxiliary")
    if problems:
        raise UnsupportedModelError("Norm layers that cannot be copied: " + "; ".join(problems) + ".")


def _computed_tensors(module: nn.Module) -> list[str]:
    # Pruning and torch's older weight norms keep weight_orig or weight_g, and set a plain tensor "weight" from it.
    attributes = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    return [name for name in attributes if any(key.startswith(f"{name}_") for key in module._parameters)]


def _some(names: Iterable[str], most: int = 4) -> str:
    listed = list(names)
    more = f", ... ({len(listed)} in all)" if len(listed) > most else ""
    return ", ".join(repr(name) for name in listed[:most]) + more
