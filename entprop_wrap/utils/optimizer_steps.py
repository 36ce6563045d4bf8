"""Checks of the gradients that an optimizer is about to step on: there, finite, and of a whole training step.

A training step runs its backwards itself. A loop may wipe the gradients after it, step inside a backward that is not
the last, or step on a loss that is NaN. One hook sees each, before any optimizer steps; a step that a gradient scaler
skips never gets there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from entprop_wrap.errors import ConfigurationError, DivergedError
from entprop_wrap.utils.modules import plain_model


class Watch:
    """The state that the training steps of one model leave for its optimizers.

    Attributes:
        diverged: On an accelerator, whether an optimizer stepped on a loss that was not finite.
    """

    def __init__(self) -> None:
        self.diverged: Tensor | None = None
        self._given: dict[int, weakref.ref[nn.Parameter]] = {}  # what has gradients of a training step
        self._finite: Tensor | None = None  # whether all losses since an optimizer's last step were
        self._unfinished: nn.Module | None = None  # the model, during a backward that is not the last of its step
        self._nonzero: set[int] | None = None  # what the first training step gave gradients that are not zero
        self._backwards = 0  # of the running training step
        # Parameters with gradients of earlier steps, to which a step that failed has added; and these gradients.
        self._mixed: list[tuple[weakref.ref[nn.Parameter], weakref.ref[Tensor]]] = []

    def begin(self, has_gradients: bool) -> None:
        """Begin a training step; a loop may have dropped the gradients of the one before.

        Raises:
            ConfigurationError: The one before failed half-way, and what it added to gradients is still there.
        """
        _hook()
        _watches.add(self)
        self._refuse_mixed()
        self._backwards = 0
        if not has_gradients:
            self._finite = None

    @contextmanager
    def backward(self, model: nn.Module, loss: Tensor, last: bool) -> Iterator[None]:
        """Note whether ``loss`` is finite; refuse steps of the model's optimizers until the last backward."""
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        self._unfinished = None if last else plain_model(model)
        self._backwards += 1
        try:
            yield
        finally:
            self._unfinished = None

    def end(self, parameters: list[nn.Parameter]) -> None:
        """Note which parameters a training step has given gradients."""
        self._given = {id(p): weakref.ref(p) for p in parameters if p.grad is not None}
        if self._nonzero is None:
            self._nonzero = {id(p) for p in parameters if has_gradient(p)}

    def failed(self, parameters: list[nn.Parameter]) -> None:
        """Note that a training step failed which cannot be undone in the gradients of ``parameters``."""
        if self._backwards:
            self._mixed = [(weakref.ref(p), weakref.ref(p.grad)) for p in parameters if p.grad is not None]

    def before_step(self, optimizer: Optimizer) -> None:
        """Check an optimizer that is about to step.

        Raises:
            ConfigurationError: The training step is not over or has failed, or its gradients are gone.
            DivergedError: Its loss was not finite (on the CPU; on an accelerator that is noted).
        """
        parameters = _parameters(optimizer)
        self._refuse_mixed(parameters)
        if self._unfinished is not None:
            self._refuse_unfinished(self._unfinished, parameters)
        trained = self._take(parameters)
        if not trained:
            return
        gone = all(parameter.grad is None for parameter in trained)
        if not gone and self._nonzero:  # zero_grad(set_to_none=False): looked for once, as reading values waits
            once = [parameter for parameter in trained if id(parameter) in self._nonzero]
            gone = bool(once) and not any(map(has_gradient, once))
        if gone:
            raise ConfigurationError(
                "The gradients of training_step() are gone: zero_grad() was called in between. training_step() runs "
                "the backward itself: move optimizer.zero_grad() before it, or after optimizer.step()."
            )
        self._nonzero = (self._nonzero or set()) - {id(parameter) for parameter in trained}
        bad = self._not_finite(optimizer, trained)
        if bad is not None and bad.device.type != "cpu":
            self._note(bad)
        elif bad is not None and bool(bad):
            raise DivergedError(
                "The loss and gradients of the last training_step() are not finite; the weights are as before. Lower "
                "the learning rate, clip gradients, or look at the data."
            )

    def after_step(self, optimizer: Optimizer) -> None:
        """Note what a closure's training steps did, which ran inside the step of the optimizer."""
        if trained := self._take(_parameters(optimizer)):
            self._note(self._not_finite(optimizer, trained))

    def _take(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        # By identity, and still alive: ids of a model that is gone are used again.
        return [p for p in parameters if id(p) in self._given and self._given.pop(id(p))() is p]

    def _refuse_mixed(self, parameters: list[nn.Parameter] | None = None) -> None:
        pairs = [(parameter(), gradient()) for parameter, gradient in self._mixed]
        present = [p for p, gradient in pairs if p is not None and gradient is not None and p.grad is gradient]
        if not any(map(has_gradient, present)):
            self._mixed = []
        elif parameters is None or not {id(p) for p in parameters}.isdisjoint(map(id, present)):
            raise ConfigurationError(
                "A training_step() failed between its backwards: part of its gradients is in the sum of those of "
                "earlier batches. Write optimizer.zero_grad(), and accumulate from the beginning."
            )

    def _refuse_unfinished(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        mine = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in mine for parameter in parameters):
            raise ConfigurationError(
                "An optimizer stepped inside backward=, which the method calls more than once a batch. Have it step in "
                "the last call only, with a second parameter named last: backward=lambda loss, last: "
                "loss_scaler(loss, optimizer, ..., need_update=last) in timm and DeiT, update_grad=last in Swin."
            )

    def _not_finite(self, optimizer: Optimizer, trained: list[nn.Parameter]) -> Tensor | None:
        finite, self._finite = self._finite, None
        if finite is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            finite = torch.zeros_like(finite)  # gradients are means over processes, whose losses may not be finite
        gradients = [p.grad for p in trained if p.grad is not None]
        if finite is None or not gradients or (finite.device.type == "cpu" and bool(finite)):
            return None
        # A loop may have dropped the batch: only gradients that are there can do harm, and where one loss was bad, only
        # those of its pass. On an accelerator, which looks at them in every step, the outermost two stand for all.
        looked_at = gradients if finite.device.type == "cpu" else [gradients[0], gradients[-1]]
        sums = torch.stack([_plain(gradient).sum(dtype=torch.float32).to(finite.device) for gradient in looked_at])
        bad = ~finite & ~sums.isfinite().all()
        skips = getattr(optimizer, "found_inf", None)  # from a scaler, by which a fused optimizer skips its step
        return bad if skips is None else bad & (skips.to(bad.device) == 0).all()

    def _note(self, bad: Tensor | None) -> None:
        if bad is not None:
            self.diverged = bad if self.diverged is None else self.diverged | bad


_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


@functools.cache
def _hook() -> None:
    # One pair of hooks for all models, never removed: torch iterates over its dictionary of hooks while it calls them.
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if kwargs.get("closure") is not None or any(callable(argument) for argument in args[1:]):
        return  # its training step is still to come
    for watch in list(_watches):
        watch.before_step(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for watch in list(_watches):
        watch.after_step(optimizer)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def has_gradient(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has a gradient that is not zero; this waits for the device."""
    return parameter.grad is not None and bool(_plain(parameter.grad).any())


def _plain(gradient: Tensor) -> Tensor:
    # This process's part of a tensor that FSDP2 shards: reading the whole would wait for the other processes.
    local: Tensor = getattr(gradient, "_local_tensor", gradient)
    return local if local.layout == torch.strided else local.to_dense()
