"""The one call that replaces forward, loss and ``loss.backward()`` in a training loop, and the object that holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.losses import Loss, cross_entropy
from entprop_wrap.methods import EntProp
from entprop_wrap.methods.base import Method, check_method
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.utils.modules import check_module, plain_model
from entprop_wrap.utils.optimizer_steps import has_gradient
from entprop_wrap.utils.options import check_function, check_generator, shown
from entprop_wrap.utils.snapshot import Snapshot
from entprop_wrap.utils.tensors import refuse_inference_mode
from entprop_wrap.wrapping.model import check_wrapped, ensure_wrapped
from entprop_wrap.wrapping.registry import idle_copies, refuse_idle_copies, refuse_inside_block

__all__ = ["TrainingStep", "check_loss", "check_trainable", "training_step"]


def training_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    method: Method | None = None,
    pixel_space: PixelSpace | None = None,
    loss: Loss | None = None,
    backward: Callable[..., Any] | None = None,
    generator: torch.Generator | None = None,
) -> StepOutput:
    """Run the forward and backward passes of one step of ``method``; gradients accumulate in ``.grad``.

        out = entprop.training_step(model, images, labels, method=EntProp(), pixel_space=PixelSpace(mean, std))
        optimizer.step()
        optimizer.zero_grad()

    Clipping, accumulation, gradient scalers and schedules stay as they are in the loop around it. A step that raises
    leaves buffers and gradients as they were. The exception, except in a model's first step: what it added to gradients
    of earlier batches stays, and ``optimizer.step()`` and the next call raise until ``zero_grad()``.

    Args:
        model: The model, wrapped if the method has auxiliaries, in training mode; or its DDP, FSDP2 or compiled
            container. It returns logits ``(N, C)``: a tensor, a dict or ``ModelOutput`` with ``logits``, or a tuple.
        images: ``(N, C, H, W)``, N at least 2, float32 or float64, in ``pixel_space``; not modified.
        labels: ``(N,)`` class indices or ``(N, C)`` probabilities; with a binary ``loss``, multi-hot or ``(N, 1)``.
        method: What to do in the step; ``EntProp()`` by default.
        pixel_space: How the images were normalised; None: they are in [0, 1].
        loss: ``(logits, labels) -> scalar mean``; None: ``torch.nn.functional.cross_entropy``. It may declare more
            parameters, see :class:`entprop_wrap.functional.losses.Pass`: the model's outputs, the images, the rows.
            It is called in every pass; so is a penalty on weights in it, which belongs to the optimizer.
        backward: What runs the backward of a loss: ``accelerator.backward``, or with a gradient scaler
            ``lambda loss: scaler.scale(loss).backward()``; None: ``loss.backward()``. It is called once per training
            pass, twice in EntProp. If it has a second parameter ``last``, that is True on the last call, the only one
            in which it may step: ``lambda loss, last: loss_scaler(loss, optimizer, need_update=last)``.
        generator: A CPU generator for random draws such as MixUp's; None: torch's default, which ``manual_seed`` sets.

    Raises:
        NotWrappedError: The method needs auxiliary norms and the model has none.
        ImageError: Images of another type, shape or layout, or (CPU, and the first batch anywhere) not finite.
        PixelRangeError: Images outside ``pixel_space`` (CPU, and the first batch anywhere).
        LabelError: Labels of another type or shape, or (CPU) out of range.
        ModelOutputError: The model returned no logits, or heads that ``loss`` would not train.
        DivergedError: The loss is not finite. With ``backward`` it is raised by ``optimizer.step()``, on an accelerator
            by the next ``output.metrics()``.
        ConfigurationError: The model is in evaluation mode or frozen as a whole, or the loss is not a mean over images.
            A loss of your own is tested in its first step, by one more call of it.
        UnsupportedModelError: The switch or the method cannot be right on this model, or the call stands inside
            ``auxiliary()``; the message says which.
    """
    method, space = _checked("training_step()", model, method, pixel_space, loss, backward, generator)
    return _run(model, images, labels, method, space, loss, backward, generator)


class TrainingStep:
    """Model, method and pixel space of a loop of one's own, held and checked once; :func:`training_step` on them.

        step = entprop.TrainingStep(model, EntProp(), PixelSpace(mean, std))
        optimizer = torch.optim.SGD(entprop.parameter_groups(model, 5e-4), lr=0.1)
        for images, labels in loader:
            out = step(images, labels)
            optimizer.step()
            optimizer.zero_grad()

    A plain model is wrapped here if the method needs auxiliaries: build the optimizer afterwards. Before a model enters
    a container (DDP, FSDP2, ``torch.compile``), wrap it.

    Args:
        model: As in :func:`training_step`, or plain.
        method: What to do in a step; ``EntProp()`` by default.
        pixel_space: How the images were normalised; None: they are in [0, 1].
        loss: As in :func:`training_step`.
        backward: As in :func:`training_step`.
        generator: As in :func:`training_step`.
        options: Options of :func:`entprop_wrap.wrap`, for a plain model: ``copies=``, ``include=``, ``exclude=``.

    Raises:
        AuxiliaryNameError: The model is wrapped, without an auxiliary that the method needs.
        ConfigurationError: The model holds other copies than the method asks for, or ``options`` do not apply.
        TypeError: The model, the method or a function is of another type.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | None = None,
        pixel_space: PixelSpace | None = None,
        *,
        loss: Loss | None = None,
        backward: Callable[..., Any] | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        self.method, self.pixel_space = _checked(
            "TrainingStep()", model, method, pixel_space, loss, backward, generator
        )
        ensure_wrapped(model, self.method, **options)
        self.model, self.loss, self.backward, self.generator = model, loss, backward, generator

    def __call__(self, images: Tensor, labels: Tensor) -> StepOutput:
        """Run one step on images ``(N, C, H, W)`` and labels; see :func:`training_step`."""
        return _run(self.model, images, labels, self.method, self.pixel_space, self.loss, self.backward, self.generator)

    def __repr__(self) -> str:
        return f"TrainingStep({type(plain_model(self.model)).__name__}, {self.method!r}, {self.pixel_space!r})"


def _checked(
    caller: str,
    model: object,
    method: object,
    pixel_space: object,
    loss: object,
    backward: object,
    generator: object,
) -> tuple[Method, PixelSpace]:
    """Return the method and the pixel space, after checks of the types of all arguments but the data."""
    check_module(caller, model)
    space = space_of(pixel_space)
    check_loss(loss)
    if backward is not None:
        check_function("backward", backward, "of a loss", "backward=accelerator.backward")
    check_generator(generator)
    return EntProp() if method is None else check_method(method), space


def _run(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    method: Method,
    space: PixelSpace,
    loss: Loss | None,
    backward: Callable[..., Any] | None,
    generator: torch.Generator | None,
) -> StepOutput:
    check_trainable(model)
    refuse_inference_mode()
    registry = check_wrapped(model, method) if method.auxiliaries else None
    refuse_inside_block(model)
    step = Step(model, images, labels, space, cross_entropy if loss is None else loss, backward, generator)
    if registry is not None:
        refuse_idle_copies(registry, method.auxiliaries)
    before = Snapshot(model, gradients=not step.checker.stepped)
    idle, without_gradients = idle_copies(model, method.auxiliaries), idle_copies(model, ())
    step.checker.watch.begin(before.has_gradients)
    try:
        output = method.step(step)
        if not (step.ended and isinstance(output, StepOutput)):
            raise ConfigurationError(
                f"{type(method).__name__}.step() must call step.backward(loss) outside of step.only_local(), as "
                f"step.auxiliary_pass() does, and return step.output(...); found {shown(output)} and "
                f"{'one' if step.ended else 'no'} such call."
            )
    except BaseException:
        before.restore()
        step.checker.watch.failed(before.kept)
        raise
    # No auxiliary pass here, as in a first lagged step, and by the gradients, which are means, in no other process.
    if method.auxiliaries and output.aux_loss is None and not any(map(has_gradient, without_gradients)):
        idle = without_gradients
    for parameter in idle:
        parameter.grad = None
    step.checker.watch.end(before.parameters)
    step.checker.stepped = True
    return output


def check_trainable(model: nn.Module) -> None:
    """Raise :class:`ConfigurationError` if a model has parameters, all of them frozen."""
    check_module("check_trainable()", model)
    if any(parameter.requires_grad for parameter in model.parameters()) or next(model.parameters(), None) is None:
        return
    raise ConfigurationError(
        f"No parameter of {type(plain_model(model)).__name__} has requires_grad=True: nothing to train. Leave some of "
        "them unfrozen, the classifier say, before the optimizer is built: model.requires_grad_(True)."
    )


def check_loss(loss: object) -> None:
    """Raise a :class:`TypeError` unless ``loss`` is a function, or None."""
    if isinstance(loss, type) or (loss is not None and not callable(loss)):
        raise TypeError(
            f"loss expects a function (logits, labels) -> scalar mean, found {loss!r}: write "
            "torch.nn.functional.cross_entropy or torch.nn.CrossEntropyLoss(), say."
        )
