"""A model's buffers and gradients as they were before a step, so that a step that fails leaves no trace."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from entprop_wrap.utils.modules import plain_model, walk


class Snapshot:
    """Buffers and gradients of ``model``, in its container or not, as they are now.

    Buffers are copied. ``gradients`` that exist are on request only; else :meth:`restore` leaves what was added to
    them.
    """

    def __init__(self, model: nn.Module, *, gradients: bool = False) -> None:
        modules = list(walk(plain_model(model)))
        self.parameters = list(
            {id(p): p for module in modules for p in module._parameters.values() if p is not None}.values()
        )
        self._gradients = [None if p.grad is None or not gradients else p.grad.clone() for p in self.parameters]
        self._kept = [p.grad is not None and not gradients for p in self.parameters]
        self._owners = [(m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for buffer in {id(buffer): buffer for _, _, buffer in self._owners}.values():
            kinds[buffer.device, buffer.dtype].append(buffer)
        self._buffers = [(buffers, _copies(buffers)) for buffers in kinds.values()]

    @property
    def kept(self) -> list[nn.Parameter]:
        """The parameters whose gradients were there and not copied."""
        return [parameter for parameter, kept in zip(self.parameters, self._kept, strict=True) if kept]

    @property
    def has_gradients(self) -> bool:
        """Whether any parameter has a gradient now."""
        return any(parameter.grad is not None for parameter in self.parameters)

    def restore(self) -> None:
        """Give the model the buffers and gradients that it had."""
        self.restore_buffers()
        for parameter, gradient, kept in zip(self.parameters, self._gradients, self._kept, strict=True):
            if not kept:
                parameter.grad = gradient

    def restore_buffers(self) -> None:
        """Give the model the buffers that it had."""
        with torch.no_grad():
            for buffers, copies in self._buffers:
                for buffer, copy in zip(buffers, copies, strict=True):
                    if buffer.shape != copy.shape:  # observers of torch.ao.quantization grow theirs in a first pass
                        buffer.resize_(copy.shape)
                torch._foreach_copy_(buffers, copies)
        for owner, name, buffer in self._owners:
            owner[name] = buffer


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(copies, [tensor.detach() for tensor in tensors])
    return copies
