"""EntProp, or any other method of this library, in the Hugging Face Trainer.

    trainer = Trainer(..., processing_class=processor, callbacks=[EntPropCallback(EntProp(fraction=0.2))])
    trainer.train()

Everything else stays the Trainer's: loss, accumulation, clipping, mixed precision, processes, schedule, evaluation.
Checkpoints hold the plain model; the auxiliary copies are in ``entprop_auxiliary.safetensors`` beside it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from entprop_wrap.errors import AuxiliaryNameError, ConfigurationError
from entprop_wrap.integrations.hf_trainer_checks import check_columns, images_name_of, pixel_space_of, refuse, split
from entprop_wrap.integrations.hf_trainer_files import separate_files
from entprop_wrap.integrations.hf_trainer_loss import TrainerLoss
from entprop_wrap.integrations.hf_trainer_rest import leave_out_small_rests
from entprop_wrap.methods import EntProp
from entprop_wrap.norms import Selector
from entprop_wrap.optimizers import check_optimizer
from entprop_wrap.perturbation import PixelSpace
from entprop_wrap.registry import find_registry
from entprop_wrap.step import Method, StepOutput
from entprop_wrap.training import training_step
from entprop_wrap.wrapping import is_wrapped, unwrap, wrap

__all__ = ["EntPropCallback", "EntPropTrainerMixin"]


class EntPropCallback(TrainerCallback):
    """Makes a Trainer train with a method of this library.

    It wraps the model when the Trainer has been built, before there is an optimizer, and takes the place of the
    Trainer's training step from the beginning to the end of ``train()``. The training loss that the Trainer logs is
    what is minimised; beside it come ``main_loss``, ``aux_loss``, ``main_entropy`` and ``aux_entropy``. A last training
    batch that is too small to train on, of one image for most methods, is left out of each epoch, with a warning.

    Args:
        method: An instance of a training method; ``EntProp()`` by default.
        pixel_space: How the images are normalised; None: as the Trainer's ``processing_class`` does it.
        include: As in ``entprop.wrap``.
        exclude: Likewise.

    Raises:
        ConfigurationError: When the Trainer is built: there is no ``processing_class`` to read the pixel space from.
            When training begins: the callback was added too late, or the columns with the images were removed.
        OptimizerMismatchError: The Trainer was given an optimizer that does not train the copies.
        UnsupportedModelError: DeepSpeed, FSDP or DataParallel; or a loss that is no function of logits and labels.
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        pixel_space: PixelSpace | None = None,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
    ) -> None:
        method = EntProp() if method is None else method
        if isinstance(method, type) or not hasattr(method, "step"):
            raise TypeError(f"EntPropCallback expects a method first, found {method!r}: write EntProp(), say.")
        self.method = method
        self.pixel_space = pixel_space
        self.selectors = {"include": include, "exclude": exclude}
        self.trainer: Any = None
        self.space: PixelSpace | None = None
        self._restore: list[tuple[str, Any]] = []
        self._totals: dict[str, Tensor] = {}
        self._steps = 0
        self._output: StepOutput | None = None

    def set_trainer(self, trainer: Any) -> None:
        """Prepare ``trainer``, before its ``train()``: what ``Trainer(callbacks=[...])`` does by itself."""
        if trainer is self.trainer:
            return
        refuse(trainer)
        if any(
            isinstance(other, EntPropCallback) and other is not self for other in trainer.callback_handler.callbacks
        ):
            raise ConfigurationError("The Trainer has two EntPropCallbacks. Expected one, with one method.")
        self.space = self.pixel_space or pixel_space_of(trainer)
        self._wrap(trainer.model, trainer.optimizer)
        create: Callable[..., nn.Module] = trainer.call_model_init
        trainer.call_model_init = lambda *args, **kwargs: self._wrap(create(*args, **kwargs))
        separate_files(trainer, self.method)
        leave_out_small_rests(trainer, self.method)
        self.trainer = trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the Trainer that is being built, and prepare it."""
        frame = inspect.currentframe()
        while frame is not None:
            found = frame.f_locals.get("self")
            if isinstance(found, Trainer) and self in found.callback_handler.callbacks:
                return self.set_trainer(found)
            frame = frame.f_back
        raise ConfigurationError("No Trainer found. Write callback.set_trainer(trainer) before trainer.train().")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the place of the training step."""
        trainer = self.trainer
        if trainer is None or self not in trainer.callback_handler.callbacks:
            raise ConfigurationError(
                "EntPropCallback was added after the Trainer was built: the optimizer knows nothing of the auxiliary "
                "copies. Write Trainer(..., callbacks=[EntPropCallback(...)]), or callback.set_trainer(trainer) "
                "between trainer.add_callback(callback) and trainer.train()."
            )
        model: nn.Module = trainer.model
        if kwargs.get("model") is not model:
            raise ConfigurationError(
                "This EntPropCallback belongs to another Trainer. Make one for each: Trainer(..., "
                "callbacks=[EntPropCallback(...)])."
            )
        check_columns(trainer)
        if self.method.auxiliaries:
            check_optimizer(model, trainer.optimizer)
        self._uninstall()
        labels_name = (trainer.label_names or ["labels"])[0]
        loss = TrainerLoss(trainer, trainer.training_step, images_name_of(model), labels_name)
        self._install("training_step", functools.partial(self._step, loss))
        self._install("log", functools.partial(self._log, trainer.log))
        self._totals, self._steps = {}, 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the Trainer its training step back."""
        self._uninstall()

    def _wrap(self, model: nn.Module, optimizer: Any = None) -> nn.Module:
        names = tuple(self.method.auxiliaries)
        if not names:
            return model
        if is_wrapped(model):  # by the user, who has options or an optimizer of their own
            if missing := set(names) - set(find_registry(model).auxiliaries):
                raise AuxiliaryNameError(
                    f"The model was wrapped without the auxiliary {sorted(missing)[0]!r} that "
                    f"{type(self.method).__name__} needs. Write wrap(model, auxiliaries={names!r})."
                )
        else:
            wrap(model, auxiliaries=names, **self.selectors)
            if optimizer is not None:
                try:
                    check_optimizer(model, optimizer)
                except Exception:
                    unwrap(model)
                    raise
        return model

    def _install(self, name: str, replacement: Any) -> None:
        self._restore.append((name, vars(self.trainer).get(name)))
        setattr(self.trainer, name, replacement)

    def _uninstall(self) -> None:
        while self._restore:
            name, before = self._restore.pop()
            if before is None:
                vars(self.trainer).pop(name, None)
            else:
                setattr(self.trainer, name, before)

    def _step(
        self, loss: TrainerLoss, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        trainer = self.trainer
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()
        inputs = trainer._prepare_inputs(inputs)
        images, labels, constants = split(inputs, loss.images_name, loss.labels_name)
        output = training_step(
            loss.begin(model, inputs, constants, num_items_in_batch),
            images,
            labels,
            method=self.method,
            pixel_space=self.space,
            loss=loss.mean,
            backward=loss.backward,
        )
        self._note(output)
        minimised: Tensor = output.loss * loss.weight()
        return minimised

    def _note(self, output: StepOutput) -> None:
        values = {"main_loss": output.main_loss, "main_entropy": output.entropy.mean()}
        if output.aux_loss is not None and output.aux_logits is not None:
            values["aux_loss"] = output.aux_loss
            values["aux_entropy"] = torch.special.entr(output.aux_logits.float().softmax(-1)).sum(-1).mean()
        for name, value in values.items():
            self._totals[name] = self._totals.get(name, 0) + value.double()
        self._steps += 1
        self._output = output

    def _log(self, log: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._totals:
            if self._output is not None and self._output.checker is not None:
                self._output.checker.raise_pending()
            means = torch.stack(list(self._totals.values())).div(self._steps)
            means = self.trainer.accelerator.gather(means[None]).mean(0)
            logs = {**logs, **dict(zip(self._totals, means.tolist(), strict=True))}
            self._totals, self._steps = {}, 0
        log(logs, *args, **kwargs)


class EntPropTrainerMixin:
    """The same as a part of your own Trainer: ``class MyTrainer(EntPropTrainerMixin, Trainer)``.

        trainer = MyTrainer(..., entprop=EntPropCallback(EntProp(fraction=0.2)))

    Args:
        entprop: The callback with its options; None: ``EntPropCallback()``.
        args: As the Trainer takes them.
        kwargs: Likewise.
    """

    def __init__(self, *args: Any, entprop: EntPropCallback | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        callback = EntPropCallback() if entprop is None else entprop
        callback.set_trainer(self)
        self.add_callback(callback)  # type: ignore[attr-defined]
