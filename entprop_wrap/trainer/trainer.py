"""``Trainer``: a whole training run on Accelerate, from a model and its data to an exported model."""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import CheckpointError, ConfigurationError, DataError, UnsupportedModelError
from entprop_wrap.functional.losses import Loss, cross_entropy
from entprop_wrap.methods import EntProp
from entprop_wrap.methods.base import Method, check_method
from entprop_wrap.methods.lagged import load_lagged_state
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.trainer.accelerator import Prepared, make_accelerator, trackers
from entprop_wrap.trainer.checkpoint import CheckpointFolder, read_state
from entprop_wrap.trainer.config import TrainerConfig
from entprop_wrap.trainer.data_loader import Batches, seed_of
from entprop_wrap.trainer.ema import make_average, share_statistics
from entprop_wrap.trainer.export import export_model
from entprop_wrap.trainer.loop import Loop, evaluating_parts
from entprop_wrap.trainer.metrics import Meter, MetricsFile, evaluate
from entprop_wrap.trainer.optimizer import wrap_with_optimizer
from entprop_wrap.trainer.run_identity import check_same_run, identity
from entprop_wrap.trainer.run_state import Position, RunState
from entprop_wrap.training import check_loss, check_pixel_space, training_step
from entprop_wrap.utils.files import check_writable, locked, on_main, together, writing
from entprop_wrap.utils.modules import plain_model
from entprop_wrap.wrapping.state_dict import main_state_dict

if TYPE_CHECKING:
    from entprop_wrap.diagnostics import Monitor

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)

#: A map-style dataset of any library, or a DataLoader over one.
Data = Dataset[Any] | DataLoader[Any] | Any


class Trainer:
    """Trains a classifier with a method, on one process or on all that ``accelerate launch`` or ``torchrun`` started.

        trainer = entprop.Trainer(model, train_data, eval_data, method=EntProp(), pixel_space=PixelSpace(mean, std))
        trainer.fit()             # metrics.jsonl, checkpoints/ and the plain model in model/, all in config.output_dir

    The model is trained in place and stays wrapped, so that training can continue; ``entprop.unwrap(trainer.model)``
    gives the plain model back.

    Parts in evaluation mode within a model in training mode, when the Trainer is built or ``fit`` begins, stay so, and
    a warning says how many: to have norm layers keep their statistics, write ``model.train()`` and then ``norm.eval()``
    for each of them. A model that is in evaluation mode itself, as from ``from_pretrained``, is put into training mode
    as a whole.

    Args:
        model: The model on any device, wrapped or plain. It is wrapped here if the method has auxiliaries.
        train_data: Map-style dataset, or DataLoader over one, of ``(image (C, H, W), label)`` or of dicts with
            "pixel_values", "images" or "image" and "labels" or "label". Order and augmentation depend on
            ``config.seed``, epoch and sample alone, see ``entprop_wrap.trainer.data_loader``.
        eval_data: Evaluation data, in the same form; None: no evaluation.
        method: What to do in a step; ``EntProp()`` by default.
        pixel_space: How the images were normalised; None: they are in [0, 1].
        loss: ``(logits, labels) -> scalar mean``, for training and evaluation; None: cross-entropy.
        config: All other options.
        optimizer: A ready optimizer over the wrapped model's parameters, instead of one by ``config.optimizer``.
        monitor: Warns of ways in which training fails quietly: ``entprop_wrap.diagnostics.Monitor()``; None: nothing.

    Attributes:
        model: The model that was given.
        position: Steps and epochs done, and the last evaluation.
        checkpoints: The checkpoint folders, with ``latest()`` and ``best()``.

    Raises:
        DataError: Data is empty, has no labels, or is not a map-style dataset.
        ConfigurationError: Options contradict the machine or each other.
        AuxiliaryNameError: The model was wrapped without an auxiliary that the method needs.
        OptimizerMismatchError: The optimizer does not train the auxiliary copies.
        UnsupportedModelError: The model is in a container, or the launcher chose what the method cannot run in.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: Data,
        eval_data: Data | None = None,
        *,
        method: Method | None = None,
        pixel_space: PixelSpace | None = None,
        loss: Loss | None = None,
        config: TrainerConfig | None = None,
        optimizer: Optimizer | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        method = EntProp() if method is None else check_method(method)
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(f"model expects a torch.nn.Module, found {model!r}.")
        if plain_model(model) is not model:
            raise UnsupportedModelError(
                f"Trainer expects a plain model, found a {type(model).__name__}: it distributes and compiles the model "
                "itself. Pass the module inside, and compile=True in the configuration for torch.compile."
            )
        check_pixel_space(pixel_space)
        check_loss(loss)
        if config is not None and not isinstance(config, TrainerConfig):
            raise TypeError(f"config expects a TrainerConfig, found {config!r}: write TrainerConfig(epochs=10), say.")
        if monitor is not None and not (hasattr(monitor, "update") and hasattr(monitor, "evaluated")):
            raise TypeError(f"monitor expects Monitor(), found {monitor!r}.")
        self.model, self.method, self.monitor = model, method, monitor
        self._evaluating = evaluating_parts(model)
        self.config = TrainerConfig() if config is None else config
        self.pixel_space, self.loss = pixel_space or PixelSpace(), cross_entropy if loss is None else loss
        self.accelerator = make_accelerator(self.config)
        self.train_batches = self._batches(train_data, training=True)
        self.eval_batches = None if eval_data is None else self._batches(eval_data, training=False)

        output = Path(self.config.output_dir)
        self.checkpoints = CheckpointFolder(output / "checkpoints", self.config.keep_last, self.config.keep_best)
        # The last step of an epoch takes the batches that are left.
        total_steps = self.config.epochs * -(-len(self.train_batches) // self.config.gradient_accumulation_steps)
        on_main(self.accelerator, lambda: check_writable(output))
        # Data and options are sound; from here on the model changes.
        optimizer, schedule = wrap_with_optimizer(model, self.method, optimizer, self.config, total_steps)
        if self.config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        prepared = Prepared(self.accelerator, model, optimizer, compile=self.config.compile)
        average = None
        if self.config.ema_decay is not None:
            average = make_average(model, self.config.ema_decay)
        self._state = RunState(
            self.accelerator,
            model,
            prepared,
            schedule,
            average,
            torch.Generator(),
            Meter(),
            Position(),
            identity(
                self.config,
                model,
                optimizer,
                total_steps,
                method=self.method,
                pixel_space=self.pixel_space,
                loss=self.loss,
                precision=self.accelerator.mixed_precision,
                samples=self.train_batches.samples,
                data=self.train_batches.fingerprint,
                batches=len(self.train_batches),
                processes=self.accelerator.num_processes,
            ),
            total_steps,
        )
        self._metrics = MetricsFile(output / "metrics.jsonl")

    @property
    def position(self) -> Position:
        """Steps and epochs done, and the last evaluation."""
        return self._state.position

    def fit(self, *, resume: bool | str | Path = False) -> dict[str, float]:
        """Train to the end of the last epoch, and export the model to ``output_dir/model``.

        Resumed, a run continues bit for bit as if it had not stopped (on the CPU; elsewhere as far as kernels are
        deterministic), also in the middle of an epoch.

        Args:
            resume: True continues from the latest checkpoint in ``output_dir``, or begins where there is none; a path
                continues from that checkpoint. A damaged latest one is passed over, with a warning; an earlier path may
                be given where all later ones are damaged.

        Returns:
            The last evaluation, see :meth:`evaluate`; empty without evaluation data.

        Raises:
            CheckpointError: The checkpoint belongs to another run or is damaged; another process trains in
                ``output_dir``; it holds a run and ``resume`` is False: nothing is overwritten; or the disk is full.
            DivergedError: The loss is not finite.
        """
        if not isinstance(resume, (bool, str, Path)):
            raise ConfigurationError(f"resume must be True, False or the path of a checkpoint, found {resume!r}.")
        with ExitStack() as stack:
            on_main(self.accelerator, lambda: stack.enter_context(locked(Path(self.config.output_dir))) and None)
            self._fit(on_main(self.accelerator, lambda: self._to_resume(resume)), bool(resume))
        return self.position.evaluation or {}

    def _fit(self, checkpoint: Path | None, resume: bool) -> None:
        state, config = self._state, self.config
        if self.model.training:
            self._evaluating = evaluating_parts(self.model)
        if self._evaluating and self.accelerator.is_main_process:
            warnings.warn(
                f"{len(self._evaluating)} modules are in evaluation mode and stay so while training, such as a "
                f"{type(self._evaluating[0]).__name__}. If that is not meant, write model.train() before "
                "Trainer(model, ...).",
                stacklevel=3,
            )
        with state.prepared.running():
            # Everything is read before anything changes.
            read = together(lambda: None if checkpoint is None else state.read(checkpoint))
            set_seed(config.seed, device_specific=True)
            state.generator.manual_seed(seed_of(config.seed, "step", self.accelerator.process_index))
            load_lagged_state(self.model, {})  # a run begins without what earlier steps of the model have left
            if checkpoint is not None and read is not None:
                state.apply(read)
                self._say(f"Resumed from {checkpoint}: step {self.position.step} of {state.total_steps}.")
            elif resume:
                self._say(f"No checkpoint in {self.checkpoints.path}: training begins.")
            evaluated = self.position.evaluation is not None
            on_main(self.accelerator, lambda: self.checkpoints.clean(self.position.step))
            on_main(self.accelerator, lambda: self._metrics.cut(self.position.step, evaluated))
            loop = Loop(
                config,
                state,
                self.train_batches,
                self._train,
                None if self.eval_batches is None else self.evaluate,
                self.checkpoints,
                self._metrics,
                self.monitor,
                evaluating=self._evaluating,
            )
            with trackers(self.accelerator, config, method=self.method):
                loop.run()
        self.export(Path(config.output_dir) / "model")

    def evaluate(self, data: Data | None = None) -> dict[str, float]:
        """Evaluate the model in its main domain, or its moving average if there is one. Call it on all processes.

        Args:
            data: Other data than ``eval_data``.

        Returns:
            "loss", "accuracy" and "mean_class_accuracy", the latter two in [0, 1]; exact over all processes.

        Raises:
            DataError: There is no data, or it has no labels.
            Exception: Whatever data, model or loss raise; an error on one process is raised on all.
        """
        batches = self.eval_batches if data is None else self._batches(data, training=False)
        if batches is None:
            raise DataError("No data to evaluate on. Write Trainer(model, train_data, eval_data), or evaluate(data).")
        average, prepared = self._state.average, self._state.prepared
        rest = batches, self.loss, self.pixel_space, self.accelerator
        layout = self.config.channels_last
        if average is not None:
            share_statistics(average)
            with prepared.autocast():
                return evaluate(average.module, *rest, channels_last=layout)
        with prepared.running():
            return evaluate(prepared.model, *rest, channels_last=layout)

    def export(self, folder: str | Path) -> None:
        """Write the plain model, of the moving average if there is one, so that it loads without this package.

        Hugging Face models are written by ``save_pretrained``; of others there is ``model.safetensors`` and a
        ``model.json`` that says how to load it.
        """
        average = self._state.average
        if self.accelerator.distributed_type == DistributedType.FSDP:
            full = self.accelerator.get_state_dict(self._state.prepared.model)
            weights = {key: value for key, value in full.items() if key in main_state_dict(self.model)}
        else:
            weights = main_state_dict(self.model if average is None else average.module)

        def write() -> None:
            with writing(Path(folder)):
                export_model(self.model, weights, Path(folder))

        on_main(self.accelerator, write)
        self._say(f"Exported the {'last' if average is None else 'averaged'} weights to {folder}.")

    def _batches(self, data: Data, *, training: bool) -> Batches:
        size = self.config.batch_size
        return together(
            lambda: Batches(
                data,
                batch_size=size if training else self.config.eval_batch_size or size,
                workers=self.config.workers,
                training=training,
                name="train_data" if training else "eval_data",
                seed=self.config.seed,
                process=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
                device=self.accelerator.device,
            )
        )

    def _to_resume(self, resume: bool | str | Path) -> Path | None:
        """Return the checkpoint to resume from, or None; raise where that would mix or overwrite runs."""
        checkpoint = self.checkpoints.to_resume(resume)
        elsewhere = checkpoint is None or checkpoint.resolve().parent != self.checkpoints.path.resolve()
        if elsewhere and resume is not True and self._metrics.path.exists():
            raise CheckpointError(
                f"{self._metrics.path} holds the metrics of another run. Choose a new output_dir, or remove that one; "
                "fit(resume=True) begins again there."
            )
        if checkpoint is None and self.position.step:
            raise CheckpointError(
                "This Trainer has trained already, and kept no checkpoint to resume from. Make a new Trainer: the "
                "model keeps its weights."
            )
        if checkpoint is not None:
            check_same_run(checkpoint, read_state(checkpoint)["run"], self._state.identity)
        return checkpoint

    def _train(self, images: Tensor, labels: Tensor, divisor: int) -> StepOutput:
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return training_step(
            self._state.prepared.model,
            images,
            labels,
            method=self.method,
            pixel_space=self.pixel_space,
            loss=self.loss,
            backward=lambda loss: self.accelerator.backward(loss / divisor),
            generator=self._state.generator,
        )

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.info(message)
