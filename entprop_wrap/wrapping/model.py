"""The switch: give a model auxiliary norm copies, choose the domain it runs in, and take the copies out again.

    model = entprop.wrap(model)                      # before the optimizer, DDP, FSDP2 and torch.compile
    with entprop.auxiliary(model):
        loss(model(hard_images), labels).backward()  # trains the shared weights and the copies
    model = entprop.unwrap(model)                    # the object it was, with the weights it has now

Source: auxiliary batch norms are from AdvProp (Xie et al., CVPR 2020), for layer norms see EntProp (Enomoto, UAI 2024),
table 5.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import nn

from entprop_wrap.errors import (
    AlreadyWrappedError,
    AuxiliaryNameError,
    ConfigurationError,
    EntPropError,
    NotWrappedError,
    UnsupportedModelError,
)
from entprop_wrap.utils.modules import check_module, refuse_wrapping, walk
from entprop_wrap.utils.options import check_choice, check_flag, shown
from entprop_wrap.wrapping.active_domain import key_of
from entprop_wrap.wrapping.norm_layers import Selector, find_norms, is_norm, refuse_untouchable
from entprop_wrap.wrapping.registry import Registry, find_registry, find_wrapped, registry_on
from entprop_wrap.wrapping.root_hook import attach, detach
from entprop_wrap.wrapping.switched_norm import (
    COPY_PREFIX,
    Copies,
    SwitchedNorm,
    copy_of,
    drop_copies,
    free_fast_path,
    install,
    remove,
)

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    model: Model,
    *,
    auxiliaries: tuple[str, ...] = ("aux",),
    copies: Copies = "all",
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> Model:
    """Give every norm layer of ``model`` switchable auxiliary copies, in place, and return the same object.

    Until :func:`auxiliary` is entered, the model computes what it did before. Its state dict gains one
    ``<norm>.entprop_<auxiliary>.<tensor>`` for each copied tensor. Copies start equal to the norm and inherit
    dtype, device and ``requires_grad``. A checkpoint of the plain model loads with ``strict=True`` (copies then start
    from it). Either everything is wrapped, or an error is raised and nothing is.

    Wrap *before* you build the optimizer and before DDP, FSDP2 and ``torch.compile``; convert to ``SyncBatchNorm``
    before you wrap.

    Args:
        model: Any module tree with at least one norm layer.
        auxiliaries: Names of the auxiliary domains. AdvProp with several attack strengths has several.
        copies: Which tensors each auxiliary domain has of its own. "all": affine parameters and running statistics.
            "statistics": running statistics only, which adds no parameter; norm layers that keep none (layer and group
            norms) are shared, in a net of such norms all of them. "affine": affine parameters only; running statistics
            are the main domain's, and an auxiliary pass in training normalises with its batch and records nothing.
            Batch norms in training mode normalise with the batch anyway, so the main network trains exactly as with
            "all".
        include: Modules to copy in addition to the norms recognised: classes, globs over qualified names, or
            predicates ``(name, module) -> bool``.
        exclude: Modules to leave shared by all domains, in the same terms.

    Raises:
        NoNormLayersError: Nothing to copy.
        AlreadyWrappedError: The model or a part of it is wrapped.
        AuxiliaryNameError: A name is not an identifier, is repeated, or contains "norm" or "bias" (trainers decide
            weight decay by such names).
        UnsupportedModelError: The model is compiled, scripted, or inside DDP, FSDP or DataParallel, or a norm is lazy,
            parametrised, or has a ``forward`` set on the instance.
        ConfigurationError: ``include`` or ``exclude`` matches nothing, or no norm has affine parameters to copy.
    """
    check_module("wrap()", model)
    auxiliaries = _checked_names(auxiliaries)
    if any(isinstance(module, SwitchedNorm) for module in model.modules()):
        raise AlreadyWrappedError(
            f"{type(model).__name__} already has auxiliary copies. Expected a plain model: call entprop.unwrap(model) "
            "first, or name all auxiliaries in one wrap(model, auxiliaries=(...))."
        )
    refuse_wrapping(model)
    norms = find_norms(model, include, exclude)
    norms = _norms_to_switch(norms, copies)
    refuse_untouchable(norms, [COPY_PREFIX + auxiliary for auxiliary in auxiliaries])
    cloned: dict[str, dict[int, nn.Parameter]] = {auxiliary: {} for auxiliary in auxiliaries}
    made = {
        name: {auxiliary: copy_of(norm, cloned[auxiliary], copies) for auxiliary in auxiliaries}
        for name, norm in norms.items()
    }

    # Nothing has been changed so far, and nothing below fails.
    shared = {name for name, module in model.named_modules() if is_norm(module) and name not in norms}
    registry = Registry(auxiliaries, norms, copies, shared)
    for name, norm in norms.items():
        install(norm, made[name], registry.switch)
    attach(model, registry)
    return model


def unwrap(model: Model) -> Model:
    """Take the auxiliary copies out, in place, and return the same object, with the class, keys and hooks it had.

    ``model`` may be the container that Accelerate, DDP or ``torch.compile`` made around the wrapped model.

    Raises:
        NotWrappedError: There is nothing to take out, or ``model`` is only a part of a wrapped model.
        UnsupportedModelError: Called inside an ``auxiliary()`` block.
    """
    check_module("unwrap()", model)
    roots, norms = find_wrapped(model)
    if not (roots or norms):
        raise NotWrappedError(f"{type(model).__name__} has no auxiliary copies: it was not wrapped, or is unwrapped.")
    registries = [registry_on(root) for root in roots]
    for norm in norms:
        owner = norm._entprop_switch.owner
        if owner is not None and owner() is not None and owner() not in registries:
            raise NotWrappedError("This is a part of a wrapped model. Expected the model that was passed to wrap().")
    if any(registry.switch.thread().block is not None for registry in registries):
        raise UnsupportedModelError("unwrap() was called inside auxiliary(): leave the with-block first.")
    for norm in norms:
        remove(norm)
    for module in walk(model):
        drop_copies(module)
        free_fast_path(module)
    for root in roots:
        detach(root)
    return model


@contextmanager
def auxiliary(model: nn.Module, name: str | None = "aux", *, record_statistics: bool = True) -> Iterator[None]:
    """Run ``model`` through the auxiliary norm copies ``name`` inside the with-block, in this thread.

    The backward of a pass belongs to the domain of its forward, also under activation checkpointing and after the block
    has ended. Under ``torch.compile`` with a graph break inside a checkpointed block, keep the backward inside.

    Args:
        model: The wrapped model, or a DDP, FSDP2, compiled or other module around it.
        name: The auxiliary domain; None is the main domain, useful inside another block, or with
            ``record_statistics=False``.
        record_statistics: False normalises with the batch's own statistics in training mode but leaves running
            statistics alone, as attack steps want it; but for those of norm layers that ``exclude=`` left shared.

    Raises:
        NotWrappedError: ``model`` holds no wrapped model, or is only a part of one.
        AuxiliaryNameError: There is no auxiliary of that name.
        UnsupportedModelError: Norm layers were replaced, parametrised, copied in from elsewhere, or given a
            ``forward`` of their own since ``wrap``: the switch would miss them.
    """
    check_module("auxiliary()", model)
    check_flag("record_statistics", record_statistics)
    registry = find_registry(model)
    if name is not None and not (isinstance(name, str) and name in registry.auxiliaries):
        raise AuxiliaryNameError(
            f"No auxiliary named {shown(name)}; this model has {', '.join(map(repr, registry.auxiliaries))}. "
            f"Name it when wrapping: wrap(model, auxiliaries=({shown(name)},))."
        )
    with registry.switch.block(key_of(name, record_statistics)):
        yield


@dataclass(frozen=True)
class Summary:
    """The norm layers and copies of a wrapped model; ``str()`` is one line.

    Attributes:
        model: Class name of the wrapped model.
        norms: Number of switched norm layers by class name.
        auxiliaries: Names of the auxiliary domains.
        parameters: Number of parameters of the plain model.
        added: Number of parameters of all copies, which ``unwrap`` takes out again.
    """

    model: str
    norms: dict[str, int]
    auxiliaries: tuple[str, ...]
    parameters: int
    added: int

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.norms.items())
        share = 100 * self.added / max(self.parameters, 1)
        copies = "" if self.auxiliaries == ("aux",) else f" in {', '.join(self.auxiliaries)}"
        layers = f"{sum(self.norms.values())} norm layers ({kinds})"
        return f"{self.model}: {layers}, +{self.added:,} parameters{copies} ({share:.2g} %)"


def summary(model: nn.Module) -> Summary:
    """Describe a wrapped model: ``ResNet: 20 norm layers (20 BatchNorm2d), +9,600 parameters (0.086 %)``.

    Raises:
        NotWrappedError: ``model`` holds no wrapped model.
    """
    check_module("summary()", model)
    registry = find_registry(model)
    root = find_wrapped(model)[0][0]
    copies = {id(copied): copied.numel() for _, _, copied in registry.copied_parameters()}
    total = sum(parameter.numel() for parameter in root.parameters())
    added = sum(copies.values())
    kinds = Counter(type(norm).__name__ for norm in registry.norms.values())
    return Summary(type(root).__name__, dict(kinds.most_common()), registry.auxiliaries, total - added, added)


def is_wrapped(model: nn.Module) -> bool:
    """Return whether ``model`` is, contains or is a part of a wrapped model."""
    check_module("is_wrapped()", model)
    return any(isinstance(module, SwitchedNorm) for module in walk(model))


def ensure_wrapped(model: nn.Module, method: Any, **options: Any) -> bool:
    """Wrap ``model`` as ``method`` needs it, unless it is wrapped; return whether it was wrapped here.

    ``options`` are those of :func:`wrap`; ``copies`` is the method's by default.
    """
    auxiliaries, wrapped = tuple(method.auxiliaries), is_wrapped(model)
    if options and (wrapped or not auxiliaries):
        found = "is wrapped already" if wrapped else f"is not wrapped for {type(method).__name__}"
        raise ConfigurationError(
            f"{', '.join(options)} would be given to wrap(), and the model {found}. Leave that out"
            f"{', or pass a plain model' if wrapped else ''}."
        )
    if not auxiliaries:
        return False
    if wrapped:
        check_wrapped(model, method)
        return False
    wrap(model, **{"auxiliaries": auxiliaries, "copies": getattr(method, "copies", "all"), **options})
    try:
        check_wrapped(model, method)  # options may contradict the method
    except EntPropError:
        unwrap(model)
        raise
    return True


def check_wrapped(model: nn.Module, method: Any) -> Registry:
    """Return the registry of a model that is wrapped as ``method`` needs it, or raise what to write instead."""
    auxiliaries, copies = tuple(method.auxiliaries), getattr(method, "copies", "all")
    options = ("" if auxiliaries == ("aux",) else f", auxiliaries={auxiliaries}") + (
        "" if copies == "all" else f", copies={copies!r}"
    )
    call = f"entprop.wrap(model{options})"
    registry = find_registry(model, call)
    if missing := [name for name in auxiliaries if name not in registry.auxiliaries]:
        raise AuxiliaryNameError(
            f"The model was wrapped with the auxiliaries {registry.auxiliaries}, without {missing[0]!r}, which the "
            f"method needs. Write {call}, or pass a plain model to a trainer."
        )
    if copies not in ("all", registry.held):
        raise ConfigurationError(
            f"{type(method).__name__}(copies={copies!r}) was given a model with copies={registry.held!r}. Write "
            f"{call}, pass a plain model to a trainer, or give the method copies='all'."
        )
    return registry


def _checked_names(auxiliaries: object) -> tuple[str, ...]:
    if isinstance(auxiliaries, str):
        raise AuxiliaryNameError(f"auxiliaries must be a tuple of names, found a string: write ({auxiliaries!r},).")
    if not isinstance(auxiliaries, (tuple, list)):
        raise AuxiliaryNameError(f"auxiliaries must be a tuple of names such as ('aux',), found {auxiliaries!r}.")
    for name in auxiliaries:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name) or re.search("norm|bias", name, re.I):
            raise AuxiliaryNameError(
                f"{name!r} cannot name an auxiliary: expected letters, digits and underscores, without 'norm' or "
                "'bias' (trainers decide weight decay by such names). Write 'aux' or 'adv', say."
            )
    if not auxiliaries or len(set(auxiliaries)) < len(auxiliaries):
        raise AuxiliaryNameError(f"Expected at least one auxiliary and no name twice, found {tuple(auxiliaries)!r}.")
    return tuple(auxiliaries)


def _norms_to_switch(norms: dict[str, nn.Module], copies: Copies) -> dict[str, nn.Module]:
    """Return the norms to switch: with "statistics", those that keep some, or all if none does."""
    copies = cast(Copies, check_choice("copies", copies, ("all", "affine", "statistics")))
    if copies == "statistics":
        return {name: norm for name, norm in norms.items() if _has_any(norm._buffers)} or norms
    if copies == "affine" and not any(_has_any(norm._parameters) for norm in norms.values()):
        kinds = ", ".join(sorted({type(norm).__name__ for norm in norms.values()}))
        raise ConfigurationError(
            f'copies="affine" finds nothing to copy: no norm layer ({kinds}) has affine parameters. Write copies='
            '"all", or train without auxiliary domains, as EntProp(auxiliary=None) does.'
        )
    return norms  # with "affine" all: an auxiliary pass must not record statistics where there is nothing to copy


def _has_any(tensors: dict[str, Any]) -> bool:
    return any(tensor is not None for tensor in tensors.values())
