"""One training step: what a method is given, what it gives back, and the function that anyone's loop calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from entprop_wrap import checks
from entprop_wrap.containers import no_gradient_sync, plain_model, refuse_container, walk
from entprop_wrap.errors import ConfigurationError, EntPropError, LabelError, ModelOutputError, UnsupportedModelError
from entprop_wrap.losses import Loss, Target, is_mean
from entprop_wrap.norms import is_norm
from entprop_wrap.perturbation import PixelSpace
from entprop_wrap.registry import find_registry
from entprop_wrap.rows import prove_rows, rows_split
from entprop_wrap.wrapping import auxiliary, is_wrapped

__all__ = ["Method", "Step", "StepOutput"]


@dataclass(frozen=True)
class StepOutput:
    """What one training step computed. Tensors are detached and stay on the device; reading them is up to you.

    Attributes:
        loss: Scalar: what was minimised, ``main_loss + weight * aux_loss``.
        main_loss: Scalar: mean loss of the main pass.
        logits: ``(N, C)``: logits of the main pass, in training mode; of the mixed images where the method mixes them.
        entropy: ``(N,)``: entropy of their softmax, in nats.
        passes: Cost of the step, in forward and backward passes of the whole batch; vanilla training is 1.
        aux_loss: Scalar: mean loss of the auxiliary pass, before weighting; None where there is none.
        aux_logits: ``(m, C)``: logits of the auxiliary pass, or None.
        aux_images: ``(m, C, H, W)``: the images that went through the auxiliary norms, or None.
        selected: ``(m,)`` int64: their rows in the batch, most uncertain first, or None.
    """

    loss: Tensor
    main_loss: Tensor
    logits: Tensor
    entropy: Tensor
    passes: float
    aux_loss: Tensor | None = None
    aux_logits: Tensor | None = None
    aux_images: Tensor | None = None
    selected: Tensor | None = None
    checker: checks.Checker | None = None

    def metrics(self) -> dict[str, float]:
        """Return losses and mean entropies as numbers, by the names that logs use; waits for the device.

        Raises:
            LabelError: A batch since the last call held labels out of range (accelerators only, see ``checks``).
            PixelRangeError: A batch since the last call held images outside the pixel space, likewise.
        """
        if self.checker is not None:
            self.checker.raise_pending()
        values = {"loss": self.loss, "main_loss": self.main_loss, "main_entropy": self.entropy.mean()}
        if self.aux_loss is not None and self.aux_logits is not None:
            values["aux_loss"] = self.aux_loss
            values["aux_entropy"] = torch.special.entr(self.aux_logits.float().softmax(-1)).sum(-1).mean()
        return dict(zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True))


class Method(Protocol):
    """A training method: a frozen dataclass of options with one ``step``.

    Attributes:
        auxiliaries: Names of the auxiliary domains that the step runs in; empty if it needs none.
    """

    @property
    def auxiliaries(self) -> tuple[str, ...]: ...  # noqa: D102

    def step(self, step: Step) -> StepOutput:
        """Run the passes of one step and leave gradients; do not touch the optimizer."""
        ...


class Step:
    """One batch on its way through a method: model, data, and the few operations every method is made of.

    Attributes:
        model: The model or its container.
        images: ``(N, C, H, W)`` in ``space``, detached.
        labels: ``(N,)`` int64 or ``(N, C)`` probabilities.
        space: The pixel space of the images.
        loss: ``(logits, labels) -> scalar mean``.
        generator: CPU generator of the step's random draws, None for torch's default.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        space: PixelSpace,
        loss: Loss,
        backward: Callable[[Tensor], None] | None,
        generator: torch.Generator | None,
    ) -> None:
        if not model.training:
            raise ConfigurationError("The model is in evaluation mode. Write model.train() before the training step.")
        refuse_container(model)
        if not torch.is_grad_enabled():
            raise ConfigurationError("Gradients are switched off. Leave out torch.no_grad() around the training step.")
        checks.check_images(images, space)
        checks.check_batch_size(images)
        self.checker = checks.checker_of(plain_model(model))
        self.checker.images(images, space)
        self.model, self.images, self.space, self.generator = model, images.detach(), space, generator
        self.loss = loss if self.checker.loss_seen else self._first_loss(loss)
        self._restore: Callable[[], None] = _nothing
        self.labels = checks.check_labels(labels, images)
        self._backward = backward
        if self.checker.classes is not None:
            try:
                self.checker.labels(self.labels, self.checker.classes)
            except LabelError:
                self.checker.classes = None  # unless the model was given another head: its next pass shows

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, C)`` of ``images``, at least float32."""
        if self.checker.classes is None:
            return self._first_forward(images)
        logits = checks.logits_of(self.model(images), len(images), differentiable=torch.is_grad_enabled())
        if logits.shape[1] != self.checker.classes:  # the model was given another head
            self.checker.labels(self.labels, logits.shape[1])
            self.checker.classes = logits.shape[1]
        return logits

    def _first_forward(self, images: Tensor) -> Tensor:
        # Only the first pass shows how many classes there are. If the labels do not fit, it has not happened.
        checks.check_takes_images(plain_model(self.model))
        restore = buffers_restorer(self.model)
        try:
            logits = checks.logits_of(self.model(images), len(images), differentiable=torch.is_grad_enabled())
            self.checker.labels(self.labels, logits.shape[1])
        except EntPropError:
            restore()
            raise
        self.checker.classes, self._restore = logits.shape[1], restore
        return logits

    def _first_loss(self, loss: Loss) -> Loss:
        # Only a call shows whether a loss is a mean, once for each model. If it is none, the step has not happened.
        def checked(logits: Tensor, labels: Tensor) -> Tensor:
            value = loss(logits, labels)
            if self.checker.loss_seen:
                return value
            try:
                check_scalar(value)
                if not is_mean(loss, logits, labels, value):
                    raise ConfigurationError(
                        "loss must return the mean over the images it is given; found one that doubles where every "
                        "image comes twice. Write reduction='mean', and divide by no number of images of your own: "
                        "parts of a batch are weighed by how many images they hold."
                    )
            except ConfigurationError:
                self._restore()
                self.checker.classes = None
                raise
            self.checker.loss_seen, self.loss, self._restore = True, loss, _nothing
            return value

        return checked

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a scalar loss, as the training loop wants it."""
        check_scalar(loss)
        if self._backward is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._backward(loss)

    def only_local(self) -> AbstractContextManager[object]:
        """Return a context for passes before the last: DDP reduces once, in the last backward of the step."""
        return no_gradient_sync(self.model)

    def auxiliary(self, name: str | None, *, record_statistics: bool = True) -> AbstractContextManager[None]:
        """Return a context in which the model runs through the auxiliary norms ``name``; None: through its own."""
        if name is None and not is_wrapped(self.model):
            return nullcontext() if record_statistics else self._statistics_kept()
        return auxiliary(self.model, name, record_statistics=record_statistics)

    def rows_split(self, auxiliary: str | None, main: int, total: int) -> AbstractContextManager[None]:
        """Return a context in which the first ``main`` of ``total`` images run through the model's own norms.

        The rest run through the auxiliary norms; with None, all of them share the model's own. Tries out first whether
        the model allows it, see :func:`entprop_wrap.rows.prove_rows`.
        """
        if auxiliary is None:
            return nullcontext()
        prove_rows(self.model, self.images, auxiliary)
        return rows_split(self.model, auxiliary, main, total) if main < total else nullcontext()

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        # On a plain model there is no switch to say it to; what its norms record in the block is taken back.
        restore = buffers_restorer(self.model)
        try:
            yield
        finally:
            restore()

    @contextmanager
    def norms_frozen(self, frozen: bool = True) -> Iterator[None]:
        """Run norm layers on their running statistics, as in evaluation, and everything else in training mode."""
        norms = [module for module in walk(self.model) if frozen and module.training and _keeps_statistics(module)]
        for norm in norms:
            norm.training = False
        try:
            yield
        finally:
            for norm in norms:
                norm.training = True

    @contextmanager
    def norm_gradients_scaled(self, auxiliary: str | None, factor: float) -> Iterator[None]:
        """Scale the gradients of a domain's norm parameters (None: the main domain) in backwards of the with-block.

        Raises:
            UnsupportedModelError: The parameters are sharded, where hooks on them see nothing.
        """
        # By identity: norms may share a parameter, which is to be scaled once.
        parameters = {id(p): p for p in find_registry(self.model).tensors(auxiliary) if p.requires_grad}.values()
        if any(type(parameter) is not nn.Parameter for parameter in parameters):
            raise UnsupportedModelError(
                "Norm parameters of a kind of their own (FSDP shards them) cannot be re-balanced: expected plain ones. "
                "Use DDP instead of FSDP."
            )
        handles = [
            parameter.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
            for parameter in parameters
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def pixel_gradient(self, images: Tensor, target: Target) -> Tensor:
        """Return :meth:`pixel_gradient_of` the loss of ``target``."""
        return self.pixel_gradient_of(images, lambda logits: target.loss(self.loss, logits))

    def pixel_gradient_of(self, images: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the gradient of ``objective(logits)`` with respect to ``images``, up to a positive factor.

        No parameter gets a gradient. The factor is a power of two that keeps small gradients from vanishing in fp16.

        Raises:
            UnsupportedModelError: The model uses reentrant checkpointing, which torch cannot differentiate this way.
        """
        images = images.detach().requires_grad_()
        with self.only_local():
            value = objective(self.forward(images))
            scale = 2.0 ** (9 + (len(images) - 1).bit_length())
            try:
                (gradient,) = torch.autograd.grad(value * scale, images)
            except RuntimeError as error:
                if "checkpoint" not in str(error).lower():
                    raise
                raise UnsupportedModelError(
                    "Attack steps after the first need the gradient of the images alone, which reentrant activation "
                    "checkpointing cannot give. Write use_reentrant=False (gradient_checkpointing_kwargs in Hugging "
                    "Face models), or attack_steps=1."
                ) from error
        return gradient

    def warn_if_few(self, number: int) -> None:
        """Warn once per model if ``number`` images are too few for the batch statistics of an auxiliary pass."""
        if number >= 8:
            return
        registry = find_registry(self.model) if is_wrapped(self.model) else None
        noted = self.checker if registry is None else registry
        norms = [m for m in walk(self.model) if m.training] if registry is None else registry.norms.values()
        if not noted.warned and any(isinstance(norm, _BatchNorm) for norm in norms):
            noted.warned = True
            warnings.warn(
                f"Only {number} images a step go through the {'auxiliary ' if registry else ''}batch norms"
                f"{'' if registry else ' a second time'}: too few for stable statistics. "
                "Raise the batch size or the fraction to have 8 or more.",
                stacklevel=5,
            )


def buffers_restorer(model: nn.Module) -> Callable[[], None]:
    """Return a function that gives the buffers of ``model`` the values they have now."""
    buffers = list(plain_model(model).buffers())
    before = [buffer.clone() for buffer in buffers]

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    return restore


def _keeps_statistics(module: nn.Module) -> bool:
    # EvoNorm of timm and norms of one's own are known by their buffers: whatever these hold, an attack is not to move.
    return isinstance(module, _NormBase) or (bool(module._buffers) and is_norm(module))


def _nothing() -> None:
    """There is nothing to put back."""


def check_scalar(loss: object) -> None:
    """Raise :class:`ConfigurationError` unless ``loss`` is what a loss returns: a tensor without dimensions."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigurationError(
            f"loss must return a scalar tensor, the mean over the batch; found {found}. Leave out reduction='none'."
        )


def check_method(method: object) -> Method:
    """Return ``method``, or raise a :class:`TypeError` that says what it should be."""
    if isinstance(method, type) or not hasattr(method, "step") or not hasattr(method, "auxiliaries"):
        found = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise TypeError(f"method expects an instance of a training method, found {found}: write method=EntProp(), say.")
    return cast(Method, method)


def input_gradient(images: Tensor) -> Tensor:
    """Return the gradient that a backward left on ``images``.

    Raises:
        ModelOutputError: There is none: the model cut its output off its input.
    """
    if images.grad is None:
        raise ModelOutputError(
            "No gradient reached the images: the model detaches its input, or the given backward() did not run. "
            "Expected logits that are differentiable with respect to the images."
        )
    return images.grad
