"""One batch on its way through a method, with the operations that methods are made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from entprop_wrap.data import validation
from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError, DivergedError, ImageError, LabelError, UnsupportedModelError
from entprop_wrap.functional.attacks import Attack, Gradient
from entprop_wrap.functional.losses import Loss
from entprop_wrap.functional.targets import Target
from entprop_wrap.functional.uncertainty import entropy
from entprop_wrap.methods.input_gradient import ImageGradient, gradient_of
from entprop_wrap.methods.loss_checks import check_scalar, refuse_idle_heads
from entprop_wrap.methods.step_loss import StepLoss
from entprop_wrap.methods.step_output import StepOutput, finished
from entprop_wrap.utils.model_output import logits_of
from entprop_wrap.utils.modules import all_evaluating, no_gradient_sync, plain_model, refuse_container, walk
from entprop_wrap.utils.options import asked, shown
from entprop_wrap.utils.snapshot import Snapshot
from entprop_wrap.wrapping.model import auxiliary, is_wrapped
from entprop_wrap.wrapping.norm_layers import is_norm
from entprop_wrap.wrapping.registry import find_registry
from entprop_wrap.wrapping.rows import prove_rows, rows_split
from entprop_wrap.wrapping.switched_norm import AuxiliaryNorm, SwitchedNorm


class Step:
    """One batch on its way through a method: model, data, and the few operations every method is made of.

    Attributes:
        model: The model or its container.
        images: ``(N, C, H, W)`` in ``space``, detached.
        labels: ``(N,)`` int64 or ``(N, C)`` probabilities.
        space: The pixel space of the images.
        loss: ``(logits, labels) -> scalar mean``; the logits are those that :meth:`forward` returned.
        generator: CPU generator of the step's random draws, None for torch's default.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        space: PixelSpace,
        loss: Loss,
        backward: Callable[..., Any] | None,
        generator: torch.Generator | None,
    ) -> None:
        if not model.training:
            raise ConfigurationError("The model is in evaluation mode. Write model.train() before the training step.")
        refuse_container(model)
        if not torch.is_grad_enabled():
            raise ConfigurationError("Gradients are switched off. Leave out torch.no_grad() around the training step.")
        validation.check_images(images, space)
        if images.grad_fn is not None:
            raise ImageError(
                "Images are the output of something that trains, which would get no gradient. Put it inside the model, "
                "or write images.detach()."
            )
        validation.check_batch_size(images)
        self.checker = validation.checker_of(plain_model(model))
        self.checker.images(images, space)
        self.model, self.space, self.generator = model, space, generator
        self.images = images.clone() if images.is_inference() else images.detach()
        self.loss = StepLoss(loss, self.checker, len(images))
        self.checker.begin_with(self.loss.identity)
        labels = validation.check_labels(labels, images)
        self.labels = labels.clone() if labels.is_inference() else labels
        self._backward = backward
        self._tells_last = backward is not None and bool(asked(backward, ("last",), 1))
        self._local = 0  # depth of only_local blocks
        self.ended = False  # whether the last backward has run
        if self.checker.classes is None:
            validation.check_takes_images(plain_model(model))
        else:
            try:
                self._check_labels(self.checker.classes)
            except LabelError:
                self.checker.classes = None  # unless the model was given another head: its next pass shows

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, C)`` of ``images``, at least float32."""
        if len(images) < len(self.images):
            self.checker.check_takes_parts(self.model)
        output = self._call(images)
        differentiable, least = torch.is_grad_enabled(), 1 if self.loss.takes_any_targets else 2
        logits = logits_of(output, len(images), differentiable=differentiable, least=least)
        if logits.shape[1] != self.checker.classes:  # the first pass, or the model was given another head
            self._check_labels(logits.shape[1])
            if differentiable and "outputs" not in self.loss.asked:
                refuse_idle_heads(output)
            self.checker.classes = logits.shape[1]
        self.loss.passed(logits, output, images)
        return logits

    def _call(self, images: Tensor) -> Any:
        version = images._version
        try:
            output = self.model(images)
        except RuntimeError as error:
            if "a leaf Variable that requires grad is being used in an in-place" not in str(error):
                raise
            version = -1
        if images._version != version:
            raise UnsupportedModelError(
                "The model changes its images in place, which later passes of the step still need. Write x = x - mean "
                "instead of x.sub_(mean) or x -= mean in its forward."
            )
        return output

    def _check_labels(self, classes: int) -> None:
        self.checker.labels(self.labels, classes, probabilities=not self.loss.takes_any_targets)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a scalar loss, as the training loop wants it.

        The last backward of a step is the one outside :meth:`only_local`.

        Raises:
            DivergedError: The loss is not finite; looked at where that costs nothing and no scaler may be in play.
        """
        check_scalar(loss)
        last = self._local == 0
        if last and self.ended and self._tells_last:
            raise ConfigurationError(
                "The method ran two backwards of which each could be the last. Expected all but the last inside "
                "step.only_local()."
            )
        self.ended |= last
        if self._backward is None and loss.device.type == "cpu" and not bool(loss.detach().isfinite()):
            raise DivergedError(
                f"The loss is {float(loss.detach())}: the step was undone. Lower the learning rate, clip gradients, or "
                "look at the data."
            )
        with self.checker.watch.backward(self.model, loss, last):
            if self._backward is None:
                loss.backward()  # type: ignore[no-untyped-call]
            elif self._tells_last:
                self._backward(loss, last=last)
            else:
                self._backward(loss)
        self.loss.forget()

    def main_pass(self, images: Tensor, labels: Tensor | Target) -> tuple[Tensor, Tensor]:
        """Train on ``images`` through the main norms, in a pass before the last; return logits and mean loss."""
        with self.only_local():
            return self._train(images, labels, 1.0)

    def auxiliary_pass(
        self, name: str | None, images: Tensor, labels: Tensor | Target, *, weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Train on ``images`` through the auxiliary norms ``name``; return logits and mean loss, before ``weight``."""
        with self.auxiliary(name):
            return self._train(images, labels, weight)

    def _train(self, images: Tensor, labels: Tensor | Target, weight: float) -> tuple[Tensor, Tensor]:
        target = labels if isinstance(labels, Target) else Target(labels)
        logits = self.forward(images)
        loss = target.loss(self.loss, logits)
        self.backward(weight * loss)
        return logits.detach(), loss.detach()

    def output(
        self,
        *,
        logits: Tensor,
        main_loss: Tensor,
        passes: float,
        loss: Tensor | None = None,
        aux_loss: Tensor | None = None,
        aux_logits: Tensor | None = None,
        aux_images: Tensor | None = None,
        selected: Tensor | None = None,
    ) -> StepOutput:
        """Return what the step computed, detached, with the entropy of ``logits``; ``loss`` is the main one if None."""
        logits = logits.detach()
        return StepOutput(
            loss=finished(main_loss if loss is None else loss),
            main_loss=finished(main_loss),
            logits=logits,
            entropy=entropy(logits),
            passes=passes,
            aux_loss=None if aux_loss is None else finished(aux_loss),
            aux_logits=None if aux_logits is None else aux_logits.detach(),
            aux_images=None if aux_images is None else aux_images.detach(),
            selected=selected,
            checker=self.checker,
        )

    @contextmanager
    def only_local(self) -> Iterator[None]:
        """Run passes before the last: DDP reduces once, in the last backward of the step."""
        self._local += 1
        try:
            with no_gradient_sync(self.model):
                yield
        finally:
            self._local -= 1

    @contextmanager
    def auxiliary(self, name: str | None, *, record_statistics: bool = True) -> Iterator[None]:
        """Run the model through the auxiliary norms ``name`` inside the with-block; None: through its own."""
        switched = name is not None or is_wrapped(self.model)
        # A plain model has no switch, nor have norms that all domains share: what is recorded is undone.
        undone = not record_statistics and (not switched or _records_unswitched(self.model))
        before = Snapshot(self.model) if undone else None
        try:
            with auxiliary(self.model, name, record_statistics=record_statistics) if switched else nullcontext():
                yield
        finally:
            if before is not None:
                before.restore_buffers()

    def rows_split(self, auxiliary: str | None, main: int, total: int) -> AbstractContextManager[None]:
        """Return a context in which the first ``main`` of ``total`` images run through the model's own norms.

        The rest run through the auxiliary norms; with None, all of them share the model's own. Tries out first whether
        the model allows it, see :func:`entprop_wrap.wrapping.rows.prove_rows`.
        """
        self.checker.check_takes_parts(self.model)
        if auxiliary is None:
            return nullcontext()
        prove_rows(self.model, self.images, auxiliary)
        return rows_split(self.model, auxiliary, main, total) if main < total else nullcontext()

    def norms_frozen(self, frozen: bool = True) -> AbstractContextManager[None]:
        """Run norm layers on their running statistics, as in evaluation, and everything else in training mode."""
        return all_evaluating(module for module in walk(self.model) if frozen and _keeps_statistics(module))

    @contextmanager
    def norm_gradients_scaled(self, auxiliary: str | None, factor: float) -> Iterator[None]:
        """Scale the gradients of a domain's norm parameters (None: the main domain) in backwards of the with-block.

        Raises:
            UnsupportedModelError: The parameters are sharded, where hooks on them see nothing.
        """
        registry = find_registry(self.model)
        others = [domain for domain in (None, *registry.auxiliaries) if domain != auxiliary]
        # A parameter that domains share sees all images: it needs no balance.
        shared = {id(p) for domain in others for p in registry.tensors(domain)}
        # By identity: norms may share a parameter, which is to be scaled once.
        own = {id(p): p for p in registry.tensors(auxiliary) if p.requires_grad and id(p) not in shared}
        parameters = own.values()
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

    def image_gradient(self, images: Tensor) -> ImageGradient:
        """Return what watches the next pass for the gradient of ``images``, a leaf ``(N, C, H, W)``."""
        return ImageGradient(self.model, images)

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
            return gradient_of(value * scale, images)

    def attack(self, attack: Attack, gradient: Gradient) -> Tensor:
        """Return what ``attack`` makes of the images, which it may change in place: it is given a copy.

        Raises:
            ConfigurationError: It returned something else than images like those.
        """
        images: Any = attack.run(self.images.clone(), gradient, self.space, self.generator)
        if not isinstance(images, Tensor) or images.shape != self.images.shape or images.dtype != self.images.dtype:
            raise ConfigurationError(
                f"{type(attack).__name__}.run() must return images like those that it is given, {shown(self.images)}; "
                f"found {shown(images)}."
            )
        return images

    def warn_if_mixed(self) -> None:
        """Warn once per model if labels look like those of images that the loop has mixed already."""
        if self.checker.mixing_seen or not self.labels.is_floating_point():
            return
        self.checker.mixing_seen = True
        several = (self.labels > self.labels.amin(1, keepdim=True) + 1e-4).sum(1) > 1
        one_in_all = self.labels.sum(1) < 1.01  # not multi-hot
        if self.labels.shape[1] > 2 and bool((several & one_in_all).any()):
            warnings.warn(
                "Some labels hold several classes, as of images that were mixed, and the method mixes them again. If "
                "the loop mixes (timm's Mixup, torchvision's RandomMixup), leave that out, or write mix=None.",
                stacklevel=5,
            )

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


def _keeps_statistics(module: nn.Module) -> bool:
    # EvoNorm of timm and norms of one's own are known by their buffers: whatever these hold, an attack is not to move.
    return isinstance(module, _NormBase) or (bool(module._buffers) and is_norm(module))


def _records_unswitched(model: nn.Module) -> bool:
    """Return whether ``model`` has norm layers with statistics that know of no switch."""
    return any(_keeps_statistics(m) for m in walk(model) if not isinstance(m, (AuxiliaryNorm, SwitchedNorm)))
