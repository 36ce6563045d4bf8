"""Stand-ins for a model and its loss during a step in Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.errors import UnsupportedModelError


class ModelInContext(nn.Module):
    """The classifier as the step calls it: in the precision plugin's context, which is autocast or nothing."""

    def __init__(self, model: nn.Module, context: Callable[[], Any]) -> None:
        super().__init__()
        self._orig_mod = model  # the name that compiled modules use: whatever looks for the plain model finds it
        self.context = context
        self.form: type = Tensor

    def forward(self, images: Tensor) -> Any:
        """Return the model's output for ``images``."""
        with self.context():
            output = self._orig_mod(images)
        self.form = type(output)
        return output

    def in_its_form(self, logits: Tensor) -> Any:
        """Return ``logits`` as the model returned its last output."""
        if issubclass(self.form, Tensor):
            return logits
        return (logits,) if issubclass(self.form, tuple) else NamedLogits(logits=logits)


class NamedLogits(dict[str, Tensor]):
    """Logits as models return them that name their outputs: ``.logits``, ``["logits"]`` or ``[0]``."""

    @property
    def logits(self) -> Tensor:
        """The logits ``(N, C)``."""
        return self["logits"]

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__("logits" if key == 0 else key)


class KnownOutput:
    """A ``forward`` of a model whose ``output`` on ``images`` is known; it counts its ``calls``."""

    def __init__(self, name: str, images: Tensor, output: Any) -> None:
        self.name, self.images, self.output = name, images, output
        self.calls = 0

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Return the known output; raise if the images are others, or the model is to compute a loss."""
        self.calls += 1
        if inputs.get("labels") is not None:
            raise UnsupportedModelError(
                f"training_step lets {self.name} compute the loss, which is impossible for mixed or selected images. "
                "Write torch.nn.functional.cross_entropy(self.model(images).logits, labels)."
            )
        given, known = args[0] if args else next(iter(inputs.values()), None), self.images
        same = isinstance(given, Tensor) and given.dtype == known.dtype and torch.equal(given, known)
        if given is not known and not same:
            raise UnsupportedModelError(
                f"training_step gives {self.name} other images than the batch holds. Change them before, in the "
                "dataset or in the module's on_after_batch_transfer."
            )
        return self.output


class _AlreadyDone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.number = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + int(ctx.number))


def already_done(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Return a loss whose backward adds nothing to ``parameters``, but reaches them: so DDP reduces their gradients."""
    anything = loss.new_zeros(()).requires_grad_()  # something has to be differentiable, with one process too
    result: Tensor = _AlreadyDone.apply(loss, anything, *parameters)
    return result
