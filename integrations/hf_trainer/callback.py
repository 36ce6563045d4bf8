"""The callback, and the Trainer that it makes of a Trainer.

No event of the Trainer lies between the backward and the clipping of gradients, so a callback alone cannot add a pass.
``EntPropCallback`` therefore gives the Trainer a class of its own: its former class, with ``EntPropMixin`` before it.
What the mixin overrides is all that differs.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainerCallback

from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.data.validation import check_takes_images
from entprop_wrap.errors import ConfigurationError, UnsupportedModelError
from entprop_wrap.integrations.hf_trainer.checkpoints import PlainCheckpoints
from entprop_wrap.integrations.hf_trainer.loss import TrainerLoss
from entprop_wrap.methods import EntProp, FastAdvProp
from entprop_wrap.methods.base import Method, check_method
from entprop_wrap.methods.lagged import load_lagged_state
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.training import training_step
from entprop_wrap.wrapping.model import ensure_wrapped, is_wrapped, unwrap
from entprop_wrap.wrapping.optimizer import check_optimizer
from entprop_wrap.wrapping.state_dict import auxiliary_names

__all__ = ["EntPropCallback"]


class EntPropCallback(TrainerCallback):
    """Makes a Trainer train with a method of this library.

    It wraps a plain model when the Trainer has been built, before there is an optimizer, and takes the place of the
    Trainer's training step during ``train()``. The training loss that the Trainer logs is what is minimised; beside it
    come ``main_loss``, ``aux_loss``, ``main_entropy`` and ``aux_entropy``. A last training batch that is too small to
    train on, of one image for most methods, is left out of each epoch, with a warning.

    Args:
        method: An instance of a training method; ``EntProp()`` by default.
        pixel_space: Normalisation of the images; None: that of the Trainer's ``processing_class``.

    Raises:
        ConfigurationError: When the Trainer is built: there is no ``processing_class`` to read the pixel space from.
            When training begins: the callback was added too late.
        OptimizerMismatchError: The Trainer was given an optimizer that does not train the copies.
        UnsupportedModelError: DeepSpeed, FSDP, DataParallel, an optimizer that steps inside the backward; or a loss
            that is not a function of logits and labels.
    """

    def __init__(self, method: Method | None = None, *, pixel_space: PixelSpace | None = None) -> None:
        self.method: Method = EntProp() if method is None else check_method(method)
        self.pixel_space = None if pixel_space is None else space_of(pixel_space)
        self.trainer: Any = None
        self.space: PixelSpace | None = None
        self.loss: TrainerLoss | None = None
        self.steps: list[dict[str, Tensor]] = []  # since the last log
        self.checker: Any = None

    def set_trainer(self, trainer: Any) -> None:
        """Prepare ``trainer``, before its ``train()``: what ``Trainer(callbacks=[...])`` does by itself."""
        if trainer is self.trainer:
            return
        _refuse(trainer)
        if any(isinstance(one, EntPropCallback) and one is not self for one in trainer.callback_handler.callbacks):
            raise ConfigurationError("The Trainer has two EntPropCallbacks. Expected one, with one method.")
        if self.pixel_space is None and trainer.processing_class is None:
            raise ConfigurationError(
                "Nothing says how the images are normalised. Write Trainer(..., processing_class=image_processor) or "
                "EntPropCallback(..., pixel_space=PixelSpace(mean, std))."
            )
        self.space = self.pixel_space or PixelSpace.from_processor(trainer.processing_class)
        self.wrap(trainer.model, trainer.optimizer)
        _warn_of_dropout(trainer.model)
        self.trainer, trainer.entprop = trainer, self
        if not isinstance(trainer, EntPropMixin):
            former = type(trainer)
            own = {"__module__": former.__module__, "__qualname__": former.__qualname__, "__doc__": former.__doc__}
            trainer.__class__ = type(former.__name__, (EntPropMixin, former), own)

    def wrap(self, model: nn.Module, optimizer: Any = None) -> nn.Module:
        """Wrap a model of the Trainer if the method needs it; an ``optimizer`` must train its copies."""
        if ensure_wrapped(model, self.method) and optimizer is not None:
            try:
                check_optimizer(model, optimizer)
            except Exception:
                unwrap(model)
                raise
        return model

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the Trainer that is being built, and prepare it."""
        self.set_trainer(_trainer_being_built(self))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what there is only now, and begin to take the place of the training step."""
        trainer, model = self.trainer, kwargs.get("model")
        if trainer is None or self not in trainer.callback_handler.callbacks:
            raise ConfigurationError(
                "EntPropCallback was added after the Trainer was built. Write Trainer(..., callbacks=[EntPropCallback("
                "...)]), or callback.set_trainer(trainer) between trainer.add_callback(callback) and trainer.train()."
            )
        if model is not trainer.model:
            raise ConfigurationError("This EntPropCallback belongs to another Trainer. Make one for each.")
        if "training_step" in vars(trainer):
            raise ConfigurationError(
                "The Trainer has another training_step as an attribute. Override it in a subclass of Trainer instead."
            )
        if self.method.auxiliaries:
            if not is_wrapped(model):
                raise ConfigurationError(
                    "The model was unwrapped after this Trainer was built, whose optimizer trains the copies that are "
                    "gone. Build a new Trainer, with a callback of its own, to train on."
                )
            check_optimizer(model, trainer.optimizer)
        self.loss = TrainerLoss(trainer, super(EntPropMixin, trainer).training_step)  # type: ignore[misc]
        self.steps, self.checker = [], None

    def add(self, output: StepOutput) -> None:
        """Keep what the next log shows of a step, on the device."""
        self.steps.append({name: value for name, value in output.scalars().items() if name != "loss"})
        self.checker = output.checker

    def pop_means(self, accelerator: Any) -> dict[str, float]:
        """Return means over the steps since the last log and all processes; raise what was found in their batches."""
        steps, self.steps = self.steps, []
        if self.checker is not None:
            self.checker.raise_pending()
        if not steps:
            return {}
        names = list(dict.fromkeys(name for step in steps for name in step))
        own = [torch.stack([step[name].float() for step in steps if name in step]).mean() for name in names]
        return dict(zip(names, accelerator.gather(torch.stack(own)[None]).mean(0).tolist(), strict=True))


class EntPropMixin(PlainCheckpoints):
    """What a Trainer does otherwise once it has an :class:`EntPropCallback`."""

    entprop: EntPropCallback

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; what waits for a lagged step is of this run alone."""
        load_lagged_state(self.model, {})
        try:
            return super().train(*args, **kwargs)
        finally:
            self.entprop.loss = None
            load_lagged_state(self.model, {})

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new model, wrapped."""
        return self.entprop.wrap(super().call_model_init(trial))

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Return what decays; a copy decays if its original does."""
        names, copies = set(super().get_decay_parameter_names(model)), auxiliary_names(model)
        return [name for name, _ in model.named_parameters() if copies.get(name, name) in names]

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's loader without a last batch that is too small to train on.

        ``TrainingArguments(dataloader_drop_last=True)`` would leave out every incomplete last batch, of evaluation too.
        In several processes accelerate fills the last batches up from the first ones (``even_batches``).
        """
        loader = super().get_train_dataloader()
        # FastAdvProp trains two parts of a batch, each of at least two images; all others need two images.
        least = 4 if isinstance(self.entprop.method, FastAdvProp) else 2
        sampler = getattr(loader, "batch_sampler", None)
        if type(sampler) is not BatchSampler or sampler.drop_last or not hasattr(sampler.sampler, "__len__"):
            return loader
        number, size = len(sampler.sampler), sampler.batch_size  # type: ignore[arg-type]
        if 0 < (rest := number % size) < least <= size < number:
            sampler.drop_last = True  # the loader's length follows, and all that the Trainer computes from it
            if self.is_local_process_zero():
                warnings.warn(
                    f"{number} training images in batches of {size} leave a last batch of {rest}, too small for "
                    f"{type(self.entprop.method).__name__}: it is left out of every epoch, which has {len(sampler)} "
                    "batches then. Another per_device_train_batch_size leaves no such rest.",
                    stacklevel=2,
                )
        return loader

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Run the passes of the method on a micro-batch, each with the Trainer's own loss and backward."""
        loss = self.entprop.loss
        if loss is None:  # the callback was removed
            return super().training_step(model, inputs, num_items_in_batch)
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        model, images, labels = loss.begin(model, self._prepare_inputs(inputs), num_items_in_batch)
        output = training_step(
            model,
            images,
            labels,
            method=self.entprop.method,
            pixel_space=self.entprop.space,
            loss=loss.mean,
            backward=loss.backward,
        )
        self.entprop.add(output)
        return output.loss * loss.factor

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log both losses and entropies beside the training loss."""
        if "loss" in logs:
            logs = {**logs, **self.entprop.pop_means(self.accelerator)}
        super().log(logs, *args, **kwargs)


def _trainer_being_built(callback: EntPropCallback) -> Any:
    """Return the Trainer that calls ``callback``.

    An event is given the model, the optimizer and the loaders, but nothing that leads to the Trainer (transformers
    hands it to its own ``JITCheckpointCallback`` by ``set_trainer``). The caller's frame has it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and callback in found.callback_handler.callbacks:
            return found
        frame = frame.f_back
    raise ConfigurationError("No Trainer found. Write callback.set_trainer(trainer) before trainer.train().")


def _refuse(trainer: Any) -> None:
    """Raise :class:`UnsupportedModelError` for models without images, and for what cannot be right."""
    check_takes_images(trainer.model)
    for name, found in (
        ("DeepSpeed", trainer.is_deepspeed_enabled),
        ("FSDP", trainer.is_fsdp_enabled),
        ("DataParallel over several GPUs", trainer.args.n_gpu > 1),
    ):
        if found:
            raise UnsupportedModelError(
                f"EntPropCallback does not work with {name}. Expected one process per GPU (torchrun, DDP); "
                "entprop.Trainer also trains under FSDP2."
            )
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "layerwise" in optim or "lomo" in optim:
        raise UnsupportedModelError(
            f"optim={optim!r} updates weights inside the backward, and a step has several backwards. Expected an "
            "optimizer that steps after them, such as optim='adamw_torch', or 'galore_adamw' without '_layerwise'."
        )


def _warn_of_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p >= 0.8:  # MobileNet's 0.999: keep for drop
            warnings.warn(
                f"{name!r} drops {module.p:.1%} of its input in training, surely the share to keep: little is learnt. "
                "Write entprop_wrap.finetuning.repair_keep_probabilities(model) before training.",
                stacklevel=2,
            )
