"""What stands around and in for a model in Lightning's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from entprop_wrap.containers import plain_model
from entprop_wrap.errors import UnsupportedModelError

__all__ = ["LogitsOf", "ModelInContext", "already_done", "stand_in"]


class ModelInContext(nn.Module):
    """The classifier as the step calls it: in the precision plugin's context, which is autocast or nothing.

    It holds the model under the name that compiled modules use, so that everything that looks for the plain model
    inside a container finds it.

    Attributes:
        kind: Puts logits into the form in which the model returned its last output.
    """

    def __init__(self, model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self._orig_mod = model
        self.context = context
        self.kind: Callable[[Tensor], Any] = lambda logits: logits

    def forward(self, images: Tensor) -> Any:
        """Return the model's output for ``images``."""
        with self.context():
            output = self._orig_mod(images)
        if isinstance(output, tuple):
            self.kind = lambda logits: (logits,)
        elif not isinstance(output, Tensor):
            self.kind = lambda logits: NamedLogits(logits=logits)
        return output


class NamedLogits(dict[str, Tensor]):
    """Logits as models return them that name their outputs: ``.logits``, ``["logits"]`` or ``[0]``."""

    @property
    def logits(self) -> Tensor:
        """The logits ``(N, C)``."""
        return self["logits"]

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__("logits" if key == 0 else key)


class LogitsOf(nn.Module):
    """Stands in for a model whose output on ``images`` is known.

    Attributes:
        calls: How often it was called.
    """

    def __init__(self, model: nn.Module, images: Tensor, output: Any) -> None:
        super().__init__()
        self.__dict__.update(stands_for=model, images=images, output=output)
        self.calls = 0

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Return the known output.

        Raises:
            UnsupportedModelError: These are other images, or the model is to compute a loss.
        """
        self.calls += 1
        given = args[0] if args else next(iter(inputs.values()), None)
        name = type(plain_model(self.__dict__["stands_for"])).__name__
        if inputs.get("labels") is not None:
            raise UnsupportedModelError(
                f"training_step lets {name} compute the loss, which cannot be done for mixed or selected images. "
                "Compute it of logits: torch.nn.functional.cross_entropy(self.model(images).logits, labels)."
            )
        images = self.__dict__["images"]
        same = isinstance(given, Tensor) and given.dtype == images.dtype
        if given is not images and not (same and torch.equal(given, images)):  # type: ignore[arg-type]
            raise UnsupportedModelError(
                f"training_step gives {name} other images than the batch holds. Change images where "
                "EntPropLightningCallback sees it: in the data set, or in the module's on_after_batch_transfer."
            )
        return self.__dict__["output"]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"], name)


@contextmanager
def stand_in(module: nn.Module, name: str, replacement: LogitsOf) -> Iterator[None]:
    """Put ``replacement`` in the place of the part ``name`` of ``module``, or of its forward if that is ``"self"``."""
    if name != "self":
        path, _, last = name.rpartition(".")
        parts = module.get_submodule(path)._modules
        before = parts[last]
        parts[last] = replacement
        try:
            yield
        finally:
            parts[last] = before
        return
    own = vars(module).get("forward")  # Lightning leaves one under DDP
    module.forward = replacement.forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class _AlreadyDone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.number = len(parameters)  # type: ignore[attr-defined]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        return tuple(None for _ in range(1 + ctx.number))


def already_done(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Return a loss whose backward reaches ``parameters`` and adds nothing: their gradients are there already.

    Reaching them is what makes DDP reduce the gradients that they have.
    """
    anything = loss.new_zeros(()).requires_grad_()  # something has to be differentiable, with one process too
    result: Tensor = _AlreadyDone.apply(loss, anything, *parameters)
    return result
