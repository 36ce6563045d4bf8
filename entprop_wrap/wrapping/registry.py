"""The registry of a wrapped model: its auxiliaries and switched norms, and the audit of these."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from entprop_wrap.errors import ConfigurationError, NotWrappedError, UnsupportedModelError
from entprop_wrap.utils.modules import refuse_container, refuse_static_graph, walk
from entprop_wrap.wrapping.active_domain import ActiveDomain
from entprop_wrap.wrapping.norm_layers import is_norm
from entprop_wrap.wrapping.switched_norm import COPY_PREFIX, AuxiliaryNorm, SwitchedNorm

#: What a wrapped root holds its registry as.
ATTRIBUTE = "_entprop_registry"


#: The registries of all wrapped models.
living: weakref.WeakSet[Registry] = weakref.WeakSet()


class Registry:
    """The switch, the auxiliaries and the switched norms of a wrapped model, held by its root."""

    def __init__(self, auxiliaries: tuple[str, ...], norms: dict[str, nn.Module], held: str, shared: set[str]) -> None:
        self.auxiliaries = auxiliaries
        self.norms = norms
        self.shared = shared  # names of norms that all domains share
        self.known: dict[int, weakref.ref[nn.Module]] = {}  # modules that an audit has looked at
        self.held = held  # what the copies hold: wrap(copies=)
        self.warned = False  # of too small auxiliary batches
        self.unchecked: set[str | None] = set(auxiliaries)  # whether their passes read what only the main domain should
        self.switch = ActiveDomain()
        self.switch.owner = weakref.ref(self)
        living.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "known": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.switch.owner = weakref.ref(self)
        living.add(self)

    def tensors(self, auxiliary: str | None) -> Iterator[nn.Parameter]:
        """Yield the norm parameters that run in ``auxiliary``, or in the main domain for None."""
        for norm in self.norms.values():
            copied = {} if auxiliary is None else copy_in(norm, auxiliary)._parameters
            yield from (parameter for parameter in {**norm._parameters, **copied}.values() if parameter is not None)

    def copies(self, auxiliary: str) -> list[nn.Module]:
        """Return the copies of one auxiliary, norm by norm."""
        return [copy_in(norm, auxiliary) for norm in self.norms.values()]

    def idle(self, running: set[str | None]) -> list[nn.Parameter]:
        """Return the norm parameters that train, and that no pass in the ``running`` domains goes through."""
        domains = [domain for domain in (None, *self.auxiliaries) if domain not in running]
        parameters = (parameter for domain in domains for parameter in self.tensors(domain))
        used = {id(parameter) for domain in running for parameter in self.tensors(domain)}  # some are shared
        # FSDP shards parameters into tensor subclasses, and does not mind idle ones.
        return [p for p in parameters if p.requires_grad and type(p) is nn.Parameter and id(p) not in used]

    def copied_parameters(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Yield ``(name of the norm parameter, the parameter, one copy of it)`` over all norms and auxiliaries."""
        for name, norm in self.norms.items():
            for auxiliary in self.auxiliaries:
                copies = copy_in(norm, auxiliary)._parameters
                for key, parameter in norm._parameters.items():
                    copied = copies.get(key)
                    if parameter is not None and copied is not None:
                        yield f"{name}.{key}" if name else key, parameter, copied


def _added(registry: Registry, root: nn.Module) -> list[str]:
    """Return the names of norm layers in training that came after ``wrap``; each module is looked at once."""
    known = registry.known
    new = [m for m in walk(root) if (seen := known.get(id(m))) is None or seen() is not m]
    if not new:
        return []
    names = {id(module): name for name, module in root.named_modules()}  # the first of several, as in wrap()
    added = []
    for module in new:
        # Compiling by region and checkpoint wrappers put a module around parts of the model.
        name = names.get(id(module), "").replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
        if isinstance(module, SwitchedNorm) or name in registry.shared or not is_norm(module):
            known[id(module)] = weakref.ref(module)
        elif module.training:
            added.append(name)
    return added


def copy_in(norm: nn.Module, auxiliary: str) -> nn.Module:
    """Return the copy of ``norm`` for one auxiliary."""
    return cast(nn.Module, norm._modules[COPY_PREFIX + auxiliary])


def find_registry(model: nn.Module, wrap: str = "entprop.wrap(model)") -> Registry:
    """Return the registry of the one wrapped model in ``model``, after an audit of its norms.

    ``wrap`` is what the message about a plain model says to write. The audit walks the module tree (about a
    microsecond a module): conversions replace norms without a trace.
    """
    roots, norms = find_wrapped(model)
    if len(roots) > 1:
        kinds = ", ".join(type(root).__name__ for root in roots)
        raise UnsupportedModelError(f"Found several wrapped models in one ({kinds}). Pass the one you mean.")
    refuse_container(model)
    refuse_static_graph(model)
    if not roots:
        if not norms:
            raise NotWrappedError(f"{type(model).__name__} is not wrapped. Write {wrap} before the optimizer is built.")
        raise NotWrappedError(
            "This is a part of a wrapped model, or a copy of a part. Expected the model that was passed to wrap()."
        )
    registry = registry_on(roots[0])
    _audit(registry, norms, roots[0])
    return registry


def idle_copies(model: nn.Module, auxiliaries: tuple[str, ...]) -> list[nn.Parameter]:
    """Return the copies that have no gradient, of other domains than ``auxiliaries``, where processes train together.

    DDP gives them gradients of zeros, which weight decay and momentum would follow.
    """
    roots = find_wrapped(model)[0] if torch.distributed.is_available() and torch.distributed.is_initialized() else []
    return [p for root in roots for p in registry_on(root).idle({None, *auxiliaries}) if p.grad is None]


def refuse_inside_block(model: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` inside an ``auxiliary()`` block of ``model``, plain or wrapped."""
    if any(registry_on(root).switch.thread().block is not None for root in find_wrapped(model)[0]):
        raise UnsupportedModelError(
            "training_step() was called inside auxiliary(): its main pass would run through the copies. Leave the "
            "with-block first; the method enters the auxiliary domains itself."
        )


def refuse_idle_copies(registry: Registry, auxiliaries: tuple[str, ...]) -> None:
    """Raise :class:`ConfigurationError` if copies stay equal to what they copy: no domain would differ from main."""
    for auxiliary in auxiliaries:
        pairs = list(zip(registry.norms.values(), registry.copies(auxiliary), strict=True))
        if any(_moves(norm, copy) for norm, copy in pairs) or not all(_equal(norm, copy) for norm, copy in pairs):
            continue
        if all(value is None for _, copy in pairs for value in (*copy._parameters.values(), *copy._buffers.values())):
            continue  # nothing is copied: the norms keep no statistics, and share the rest
        if any(True for _ in registry.copied_parameters()):
            write = (
                "Expected copies that train; PEFT and other code that freezes a model freezes them too. Before the "
                "optimizer is built, write: for name, p in model.named_parameters(): "
                "p.requires_grad_(p.requires_grad or '.entprop_' in name)."
            )
        else:
            write = (
                f"Norm layers in evaluation mode record no statistics, and copies={registry.held!r} holds nothing "
                "else. Leave them in training mode, or write copies='all'."
            )
        raise ConfigurationError(
            f"The copies {auxiliary!r} are frozen and equal to the norm layers: the auxiliary pass would be a second "
            f"main pass. {write} Or train without copies: EntProp(auxiliary=None)."
        )


def _moves(norm: nn.Module, copy: nn.Module) -> bool:
    """Return whether training moves the tensors of a copy, or records the statistics of its norm."""
    records = norm.training and any(buffer is not None for buffer in norm._buffers.values())
    return records or any(parameter is not None and parameter.requires_grad for parameter in copy._parameters.values())


def _equal(norm: nn.Module, copy: nn.Module) -> bool:
    pairs = [
        (value, tensors[name])
        for tensors, own in ((norm._parameters, copy._parameters), (norm._buffers, copy._buffers))
        for name, value in own.items()
    ]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def registry_on(root: nn.Module) -> Registry:
    """Return the registry that ``root`` carries."""
    registry: Registry = root.__dict__[ATTRIBUTE]
    return registry


def find_wrapped(model: nn.Module) -> tuple[list[nn.Module], list[SwitchedNorm]]:
    """Return the wrapped roots and the switched norms in a module tree."""
    roots, norms = [], []
    for module in walk(model):
        if ATTRIBUTE in module.__dict__:
            roots.append(module)
        if isinstance(module, SwitchedNorm):
            norms.append(module)
    return roots, norms


def _audit(registry: Registry, norms: list[SwitchedNorm], root: nn.Module) -> None:
    problems = []
    if added := _added(registry, root):
        problems.append(
            f"{len(added)} norm layers were added after wrap(), such as {added[0]!r} (a new head): build the whole "
            "model before wrap()"
        )
    present = {id(norm) for norm in norms}
    if lost := [name for name, norm in registry.norms.items() if id(norm) not in present]:
        problems.append(
            f"{len(lost)} norm layers were replaced after wrap(), such as {lost[0]!r} (SyncBatchNorm conversion, "
            "freezing or a new head): convert and replace before wrap()"
        )
    if foreign := sum(norm._entprop_switch is not registry.switch for norm in norms):
        problems.append(
            f"{foreign} norm layers are copies taken out of a wrapped model: build the model first, then wrap() it"
        )
    names = {id(norm): repr(name) for name, norm in registry.norms.items()}
    children = [COPY_PREFIX + auxiliary for auxiliary in registry.auxiliaries]
    for norm in norms:
        name = names.get(id(norm), "a norm layer")
        if not all(isinstance(norm._modules.get(child), AuxiliaryNorm) for child in children):
            problems.append(f"the copy in {name} was replaced after wrap()")
        elif "forward" in norm.__dict__:
            problems.append(f"{name} was given a forward() of its own after wrap()")
        elif norm._parameters.keys() != norm._entprop_names:
            problems.append(f"{name} was parametrised, pruned or given other parameters after wrap()")
    if problems:
        raise UnsupportedModelError("The switch cannot reach every norm layer: " + "; ".join(problems) + ".")
