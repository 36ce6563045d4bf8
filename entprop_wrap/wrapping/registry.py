"""The registry of a wrapped model: its switched norms, the forward hook of its root, and the audit of both."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from entprop_wrap.errors import ConfigurationError, NotWrappedError, UnsupportedModelError
from entprop_wrap.utils.modules import refuse_container, refuse_static_graph, walk
from entprop_wrap.wrapping.active_domain import ActiveDomain, Key, domains_of
from entprop_wrap.wrapping.switched_norm import HOLDER_PREFIX, AuxiliaryNorm, SwitchedNorm, block_fast_path

__all__ = ["Registry", "attach", "detach", "find_registry", "find_wrapped", "refuse_idle_copies", "refuse_inside_block"]

_ATTRIBUTE = "_entprop_registry"


class Registry:
    """The switch, the auxiliaries and the switched norms of a wrapped model, held by its root."""

    def __init__(self, auxiliaries: tuple[str, ...], norms: dict[str, nn.Module]) -> None:
        self.auxiliaries = auxiliaries
        self.norms = norms
        self.warned = False  # of too small auxiliary batches
        self.unchecked: set[str | None] = set(auxiliaries)  # whether their passes read what only the main domain should
        self.switch = ActiveDomain()
        self.switch.owner = weakref.ref(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.switch.owner = weakref.ref(self)

    def tensors(self, auxiliary: str | None) -> Iterator[nn.Parameter]:
        """Yield the norm parameters that run in ``auxiliary``, or in the main domain for None."""
        for norm in self.norms.values():
            copied: Any = {} if auxiliary is None else norm._modules[HOLDER_PREFIX + auxiliary]._parameters  # type: ignore[union-attr]
            yield from (parameter for parameter in {**norm._parameters, **copied}.values() if parameter is not None)

    def copies(self, auxiliary: str) -> Iterator[nn.Module]:
        """Yield the holders of one auxiliary's tensors, norm by norm."""
        for norm in self.norms.values():
            copy = norm._modules[HOLDER_PREFIX + auxiliary]
            assert copy is not None
            yield copy

    def mirrors(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Yield ``(name of the norm parameter, the parameter, one copy of it)`` over all norms and auxiliaries."""
        for name, norm in self.norms.items():
            for auxiliary in self.auxiliaries:
                copy = norm._modules[HOLDER_PREFIX + auxiliary]
                assert copy is not None
                for key, parameter in norm._parameters.items():
                    mirror = copy._parameters.get(key)
                    if parameter is not None and mirror is not None:
                        yield f"{name}.{key}" if name else key, parameter, mirror


class _LeaveForward:
    """Forward hook of the root: pins the domain on the output, and keeps idle parameters in DDP's graph."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        switch = self.registry.switch
        if torch.compiler.is_compiling():
            key = getattr(getattr(switch.local, "state", None), "key", None)
        else:
            key = switch.resolve()
            if switch.ran is not None or (self.registry.unchecked and domains_of(key) <= self.registry.unchecked):
                self._check_reads(key, (args, kwargs), output)
            _each_tensor(output, lambda tensor: _pin(tensor, switch, key))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            idle = self._idle(domains_of(key))
            return _each_tensor(output, lambda tensor: _keep_in_graph(tensor, idle)) if idle else None
        return None

    def _check_reads(self, key: Key, inputs: Any, output: Any) -> None:
        # In the first passes with gradients. Weights in the graph of a norm that has not run were read by the model
        # itself. In an auxiliary pass so were any that belong to the main domain alone: the norms ran on their copies.
        # Norms that a pass leaves out (auxiliary heads, stochastic depth) leave their weights out, too.
        registry, switch, running = self.registry, self.registry.switch, domains_of(key)
        ran = None if _has_compiled() else switch.ran  # norms in compiled code note nothing when they run
        own = None if None in running else {id(p) for name in running for p in registry.tensors(name)}
        suspects: dict[str, set[int]] = {}
        for name, norm in registry.norms.items():
            idle = ran is not None and id(norm) not in ran
            found = [id(p) for p in norm._parameters.values() if p is not None and p.requires_grad]
            suspects[name] = {p for p in found if idle or (own is not None and p not in own)}
        used = _leaves(output, inputs) if any(suspects.values()) else set()
        if read := [name for name, suspected in suspects.items() if not used.isdisjoint(suspected)]:
            raise UnsupportedModelError(
                f"The model reads the weights of {len(read)} norm layers itself, such as {read[0]!r} (a fused kernel, "
                "or F.layer_norm with norm.weight), unseen by the switch. Call the layers and read nothing of them, or "
                f"leave them shared by all domains: wrap(model, exclude={[*read[:4], *(['...'] if read[4:] else [])]})."
            )
        switch.ran = None
        registry.unchecked -= set() if own is None else running

    def _idle(self, running: set[str | None]) -> list[nn.Parameter]:
        domains = [domain for domain in (None, *self.registry.auxiliaries) if domain not in running]
        parameters = (parameter for domain in domains for parameter in self.registry.tensors(domain))
        used = {id(parameter) for domain in running for parameter in self.registry.tensors(domain)}  # some are shared
        # FSDP shards parameters into tensor subclasses, and does not mind idle ones.
        return [p for p in parameters if p.requires_grad and type(p) is nn.Parameter and id(p) not in used]


def _pin(tensor: Tensor, switch: ActiveDomain, key: Key) -> Tensor:
    tensor.register_hook(lambda gradient: switch.pin(key))  # type: ignore[no-untyped-call]
    return tensor


def _leaves(output: Any, inputs: Any) -> set[int]:
    """Return the ids of the leaves in the graph that a pass has put between ``inputs`` and ``output``."""
    seen = {tensor.grad_fn for tensor in tree_leaves(inputs) if isinstance(tensor, Tensor)}
    found: set[int] = set()
    nodes = [tensor.grad_fn for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                found.add(id(leaf))
            nodes.extend(following for following, _ in node.next_functions)
    return found


def _has_compiled() -> bool:
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"])


def _keep_in_graph(output: Tensor, tensors: list[nn.Parameter]) -> Tensor:
    """Return ``output`` with ``tensors`` in its graph, contributing nothing: DDP then sees every parameter used."""
    kept: Tensor = _KeepInGraph.apply(output, *tensors)  # type: ignore[no-untyped-call]
    return kept


class _KeepInGraph(torch.autograd.Function):
    # 0 * sum(p) would do the same with a kernel per tensor, and turn one infinite weight into a NaN loss.

    @staticmethod
    def forward(output: Tensor, *tensors: Tensor) -> Tensor:
        return output.clone()  # as DDP's own sink does: a view made in here could not be modified in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.tensors = len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0], *([None] * ctx.tensors))


def _each_tensor(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to every differentiable tensor of a model's output; dicts (``ModelOutput``) change in place."""
    if isinstance(output, Tensor):
        return change(output) if output.requires_grad else output
    if isinstance(output, dict):
        for key in output:
            output[key] = _each_tensor(output[key], change)
        return output
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_each_tensor(item, change) for item in output))
    if isinstance(output, (list, tuple)):
        return type(output)(_each_tensor(item, change) for item in output)
    return output


def attach(root: nn.Module, registry: Registry) -> None:
    """Put the registry and its hook on the root."""
    root.__dict__[_ATTRIBUTE] = registry
    root.register_forward_hook(_LeaveForward(registry), with_kwargs=True)
    for module in root.modules():
        block_fast_path(module)


def detach(root: nn.Module) -> None:
    """Undo :func:`attach`."""
    registry, modules = registry_on(root), dict(root.named_modules())
    for place in [modules[name] for name in registry.norms if name in modules]:
        for auxiliary in registry.auxiliaries:  # a SyncBatchNorm conversion has converted the copies, too
            place._modules.pop(HOLDER_PREFIX + auxiliary, None)
    registry.norms = {}  # whoever still holds the registry finds nothing in it
    del root.__dict__[_ATTRIBUTE]
    for key in [key for key, hook in root._forward_hooks.items() if isinstance(hook, _LeaveForward)]:
        del root._forward_hooks[key], root._forward_hooks_with_kwargs[key]


def find_registry(model: nn.Module) -> Registry:
    """Return the registry of the one wrapped model in ``model``, after an audit of its norms.

    The audit walks the module tree (about 0.1 microseconds a module): conversions replace norms without a trace.
    """
    roots, norms = find_wrapped(model)
    if len(roots) > 1:
        kinds = ", ".join(type(root).__name__ for root in roots)
        raise UnsupportedModelError(f"Found several wrapped models in one ({kinds}). Pass the one you mean.")
    refuse_container(model)
    refuse_static_graph(model)
    if not roots:
        if not norms:
            raise NotWrappedError(
                f"{type(model).__name__} is not wrapped. Write entprop.wrap(model) before the optimizer is built."
            )
        raise NotWrappedError(
            "This is a part of a wrapped model, or a copy of a part. Expected the model that was passed to wrap()."
        )
    registry = registry_on(roots[0])
    _audit(registry, norms)
    return registry


def refuse_inside_block(model: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` inside an ``auxiliary()`` block of ``model``, plain or wrapped."""
    registries = [module.__dict__[_ATTRIBUTE] for module in walk(model) if _ATTRIBUTE in module.__dict__]
    if any(registry.switch.thread().block is not None for registry in registries):
        raise UnsupportedModelError(
            "training_step() was called inside auxiliary(): its main pass would run through the copies. Leave the "
            "with-block first; the method enters the auxiliary domains itself."
        )


def refuse_idle_copies(registry: Registry, auxiliaries: tuple[str, ...]) -> None:
    """Raise :class:`ConfigurationError` if copies are frozen at what they copy: no domain would differ from main."""
    for auxiliary in set(auxiliaries) & set(registry.auxiliaries):
        if any(copy.requires_grad for copy in registry.tensors(auxiliary)):
            continue
        tracks = any(buffer is not None for norm in registry.norms.values() for buffer in norm._buffers.values())
        mirrors = zip(registry.tensors(None), registry.tensors(auxiliary), strict=True)
        if not tracks and all(torch.equal(parameter, copy) for parameter, copy in mirrors):
            raise ConfigurationError(
                f"The copies {auxiliary!r} are frozen and equal to the norm layers: the auxiliary pass would be a "
                "second main pass. Expected copies that train; PEFT and other code that freezes a model freezes them "
                "too. Before the optimizer is built, write: for name, p in model.named_parameters(): "
                "p.requires_grad_(p.requires_grad or '.entprop_' in name)"
            )


def registry_on(root: nn.Module) -> Registry:
    """Return the registry that ``root`` carries."""
    registry: Registry = root.__dict__[_ATTRIBUTE]
    return registry


def find_wrapped(model: nn.Module) -> tuple[list[nn.Module], list[SwitchedNorm]]:
    """Return the wrapped roots and the switched norms in a module tree."""
    roots, norms = [], []
    for module in walk(model):
        if _ATTRIBUTE in module.__dict__:
            roots.append(module)
        if isinstance(module, SwitchedNorm):
            norms.append(module)
    return roots, norms


def _audit(registry: Registry, norms: list[SwitchedNorm]) -> None:
    problems = []
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
    names = {id(norm): name for name, norm in registry.norms.items()}
    holders = [HOLDER_PREFIX + auxiliary for auxiliary in registry.auxiliaries]
    for norm in norms:
        if not all(isinstance(norm._modules.get(holder), AuxiliaryNorm) for holder in holders):
            problems.append(f"the copy in {names.get(id(norm), '?')!r} was replaced after wrap()")
        elif "forward" in norm.__dict__:
            problems.append(f"{names.get(id(norm), '?')!r} was given a forward() of its own after wrap()")
        elif norm._parameters.keys() != norm._entprop_names:
            problems.append(
                f"{names.get(id(norm), '?')!r} was parametrised, pruned or given other parameters after wrap()"
            )
    if problems:
        raise UnsupportedModelError("The switch cannot reach every norm layer: " + "; ".join(problems) + ".")
