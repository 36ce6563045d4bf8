"""The forward hook on the root of a wrapped model: it pins the domain of a pass, and looks at the first passes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.utils.graphs import leaves_of
from entprop_wrap.utils.modules import walk
from entprop_wrap.wrapping.active_domain import ActiveDomain, Key, domains_of
from entprop_wrap.wrapping.norm_layers import is_norm
from entprop_wrap.wrapping.registry import ATTRIBUTE, Registry, registry_on
from entprop_wrap.wrapping.switched_norm import COPY_PREFIX, SwitchedNorm, block_fast_path


def attach(root: nn.Module, registry: Registry) -> None:
    """Put the registry and its hook on the root."""
    root.__dict__[ATTRIBUTE] = registry
    root.register_forward_hook(_LeaveForward(registry), with_kwargs=True)
    for module in root.modules():
        block_fast_path(module)


def detach(root: nn.Module) -> None:
    """Undo :func:`attach`."""
    registry, modules = registry_on(root), dict(root.named_modules())
    for place in [modules[name] for name in registry.norms if name in modules]:
        for auxiliary in registry.auxiliaries:  # a SyncBatchNorm conversion has converted the copies, too
            place._modules.pop(COPY_PREFIX + auxiliary, None)
    registry.norms = {}  # whoever still holds the registry finds nothing in it
    del root.__dict__[ATTRIBUTE]
    for key in [key for key, hook in root._forward_hooks.items() if isinstance(hook, _LeaveForward)]:
        del root._forward_hooks[key], root._forward_hooks_with_kwargs[key]


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
                self._check_reads(module, key, (args, kwargs), output)
            _each_tensor(output, lambda tensor: _pin(tensor, switch, key))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            idle = self.registry.idle(domains_of(key))
            return _each_tensor(output, lambda tensor: _keep_in_graph(tensor, idle)) if idle else None
        return None

    def _check_reads(self, root: nn.Module, key: Key, inputs: Any, output: Any) -> None:
        # In the first passes with gradients. Weights in the graph of a norm that has not run were read by the model
        # itself. In an auxiliary pass so were any that belong to the main domain alone: the norms ran on their copies.
        # Norms that a pass leaves out (auxiliary heads, stochastic depth) leave their weights out, too.
        registry, switch, running = self.registry, self.registry.switch, domains_of(key)
        ran = None if _has_compiled() else switch.ran  # norms in compiled code note nothing when they run
        own = None if None in running else {id(p) for name in running for p in registry.tensors(name)}
        # A norm that stays shared may be tied to one that does not; it reads its own weight.
        norms = [m for m in walk(root) if is_norm(m) and not isinstance(m, SwitchedNorm)]
        shared = {id(p) for norm in norms for p in norm._parameters.values()}
        suspects: dict[str, set[int]] = {}
        for name, norm in registry.norms.items():
            idle = ran is not None and id(norm) not in ran
            found = [id(p) for p in norm._parameters.values() if p is not None and p.requires_grad]
            suspects[name] = {p for p in found if idle or (own is not None and p not in own)} - shared
        used = leaves_of(output, inputs) if any(suspects.values()) else set()
        if read := [name for name, suspected in suspects.items() if not used.isdisjoint(suspected)]:
            raise UnsupportedModelError(
                f"The model reads the weights of {len(read)} norm layers itself, such as {read[0]!r} (a fused kernel, "
                "or F.layer_norm with norm.weight), unseen by the switch. Call the layers and read nothing of them, or "
                f"leave them shared by all domains: wrap(model, exclude={[*read[:4], *(['...'] if read[4:] else [])]})."
            )
        switch.ran = None
        registry.unchecked -= set() if own is None else running


def _pin(tensor: Tensor, switch: ActiveDomain, key: Key) -> Tensor:
    tensor.register_hook(lambda gradient: switch.pin(key))  # type: ignore[no-untyped-call]
    return tensor


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
