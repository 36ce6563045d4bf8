"""``Trainer``: a whole training run on Accelerate, from a model and its data to an exported model."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object, set_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.errors import CheckpointError, DataError, DivergedError, UnsupportedModelError
from entprop_wrap.functional.losses import Loss, cross_entropy
from entprop_wrap.methods import EntProp
from entprop_wrap.methods.base import Method, check_method
from entprop_wrap.methods.lagged import load_lagged_state
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.trainer.accelerator import Prepared, make_accelerator, trackers
from entprop_wrap.trainer.checkpoint import CheckpointFolder, better, read_state
from entprop_wrap.trainer.config import TrainerConfig
from entprop_wrap.trainer.data_loader import Batches, seed_of
from entprop_wrap.trainer.ema import MovingAverage
from entprop_wrap.trainer.evaluation import evaluate
from entprop_wrap.trainer.export import export_model
from entprop_wrap.trainer.metrics import Meter, MetricsFile
from entprop_wrap.trainer.optimizer import wrap_with_optimizer
from entprop_wrap.trainer.run_identity import alike, check_same_run, identity
from entprop_wrap.trainer.run_state import Position, RunState
from entprop_wrap.training import check_loss, training_step
from entprop_wrap.utils.files import check_writable, locked, on_main, together
from entprop_wrap.utils.modules import check_module, plain_model, walk
from entprop_wrap.wrapping.state_dict import main_state_dict
from entprop_wrap.wrapping.switched_norm import AuxiliaryNorm

if TYPE_CHECKING:
    from entprop_wrap.diagnostics import Monitor

logger = logging.getLogger(__name__)

#: A map-style dataset of any library, or a DataLoader over one.
Data = Dataset[Any] | DataLoader[Any] | Any


class Trainer:
    """Trains a classifier with a method, on one process or on all that ``accelerate launch`` or ``torchrun`` started.

        trainer = entprop.Trainer(model, train_data, eval_data, method=EntProp(), pixel_space=PixelSpace(mean, std))
        trainer.fit()             # metrics.jsonl, checkpoints/ and the plain model in model/, all in config.output_dir

    The model is trained in place and stays wrapped, so that training can continue; ``entprop.unwrap(trainer.model)``
    gives the plain model back.

    Parts in evaluation mode within a model in training mode stay so, with a warning: to have norm layers keep their
    statistics, write ``model.train()`` and then ``norm.eval()``. A model that is in evaluation mode itself, as from
    ``from_pretrained``, is put into training mode as a whole.

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
        OptimizerMismatchError: The optimizer does not train the auxiliary copies, or trains what is not the model's.
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
        check_module("Trainer()", model)
        if plain_model(model) is not model:
            raise UnsupportedModelError(
                f"Trainer expects a plain model, found a {type(model).__name__}. Pass the module inside, and "
                "compile=True in the configuration for torch.compile."
            )
        if extra := [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]:
            raise UnsupportedModelError(
                f"Checkpoints hold tensors, found {extra[0]!r} in the model's state dict. Have get_extra_state() "
                "return a tensor."
            )
        self.pixel_space = space_of(pixel_space)
        check_loss(loss)
        if config is not None and not isinstance(config, TrainerConfig):
            raise TypeError(f"config expects a TrainerConfig, found {config!r}: write TrainerConfig(epochs=10), say.")
        if monitor is not None and not (hasattr(monitor, "update") and hasattr(monitor, "evaluated")):
            raise TypeError(f"monitor expects Monitor(), found {monitor!r}.")
        self.model, self.method = model, method
        self._evaluating = _evaluating_parts(model)
        self.config = TrainerConfig() if config is None else config
        self.loss = cross_entropy if loss is None else loss
        self.accelerator = make_accelerator(self.config)
        self.monitor = monitor if self.accelerator.is_main_process else None
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
        decay = self.config.ema_decay
        average = None if decay is None else MovingAverage(model, decay)
        if decay is not None and decay**total_steps > 0.5 and self.accelerator.is_main_process:
            warnings.warn(
                f"ema_decay={decay} in {total_steps} steps: more than half of the averaged weights will be those after "
                "the first step. Choose a smaller ema_decay, or more epochs.",
                stacklevel=2,
            )
        given = {"method": self.method, "pixel_space": self.pixel_space, **self.train_batches.identity}
        run = identity(self.config, model, optimizer, self.loss, self.accelerator, total_steps, **given)
        self._state = RunState(self.accelerator, model, prepared, schedule, average, run, total_steps)
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
            resume: True continues from the latest checkpoint in ``output_dir``, or starts from scratch if there is
                none; a path continues from that checkpoint. A damaged latest one is passed over, with a warning; an
                earlier path may be given where all later ones are damaged.

        Returns:
            The last evaluation, see :meth:`evaluate`; empty without evaluation data.

        Raises:
            CheckpointError: The checkpoint belongs to another run or is damaged; another process trains in
                ``output_dir``, or it holds a run already and ``resume`` is False; or the disk is full.
            DivergedError: The loss is not finite.
        """
        with ExitStack() as stack:
            on_main(self.accelerator, lambda: stack.enter_context(locked(Path(self.config.output_dir))) and None)
            self._fit(on_main(self.accelerator, lambda: self._to_resume(resume)), bool(resume))
        return self.position.evaluation or {}

    def _fit(self, checkpoint: Path | None, resume: bool) -> None:
        state, config = self._state, self.config
        if self.model.training:
            self._evaluating = _evaluating_parts(self.model)
        if self._evaluating and self.accelerator.is_main_process:
            warnings.warn(
                f"{len(self._evaluating)} modules are in evaluation mode and stay so while training, such as a "
                f"{type(self._evaluating[0]).__name__}. If that is not meant, write model.train() before Trainer(...).",
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
            with trackers(self.accelerator, config, method=self.method):
                self._run()
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
        if average is not None:
            average.share_statistics()
            with prepared.autocast():
                return evaluate(average.module, *rest)
        with prepared.running():
            return evaluate(prepared.model, *rest)

    def export(self, folder: str | Path) -> None:
        """Write the plain model, of the moving average if there is one, so that it loads without this package.

        Hugging Face models are written by ``save_pretrained``, others to ``model.safetensors``.
        """
        average = self._state.average
        if self.accelerator.distributed_type == DistributedType.FSDP:
            full = self.accelerator.get_state_dict(self._state.prepared.model)
            weights = {key: value for key, value in full.items() if key in main_state_dict(self.model)}
        else:
            weights = main_state_dict(self.model if average is None else average.module)

        on_main(self.accelerator, lambda: export_model(self.model, weights, Path(folder)))
        self._say(f"Exported the {'last' if average is None else 'averaged'} weights to {folder}.")

    def _batches(self, data: Data, *, training: bool) -> Batches:
        batches = together(lambda: Batches(data, self.config, self.accelerator, training=training))
        seen = gather_object([batches.identity])
        if not all(alike(seen[0], other) for other in seen):
            raise DataError(
                f"{batches.name}: the {len(seen)} processes have different samples. Expected the same on each, which "
                "the Trainer shares out: write a seed where data is split, and no sampler for several processes."
            )
        return batches

    def _to_resume(self, resume: bool | str | Path) -> Path | None:
        """Return the checkpoint to resume from, or None; raise where that would mix or overwrite runs."""
        checkpoint = self.checkpoints.to_resume(resume)
        elsewhere = checkpoint is None or checkpoint.resolve().parent != self.checkpoints.path.resolve()
        if elsewhere and resume is not True and self._metrics.path.exists():
            raise CheckpointError(
                f"{self._metrics.path} holds the metrics of another run. Choose a new output_dir, or fit(resume=True) "
                "to begin again there."
            )
        if checkpoint is None and (self.position.step or self._state.meter.batches):
            raise CheckpointError(
                "This Trainer has trained already, and kept no checkpoint. Make a new one: the model keeps its weights."
            )
        if checkpoint is not None:
            check_same_run(checkpoint, read_state(checkpoint)["run"], self._state.identity)
        return checkpoint

    def _run(self) -> None:
        """Train to the end of the last epoch, from wherever the run stands."""
        state, position = self._state, self.position
        visible = self.config.progress and self.accelerator.is_main_process
        with tqdm(total=state.total_steps, initial=position.step, disable=not visible, unit="step") as self._bar:
            state.prepared.model.zero_grad()
            self._since = time.perf_counter()
            self._images = 0
            if position.epoch and not position.batch and position.evaluation is None:
                self._evaluate_if_due()  # which was interrupted
            while position.epoch < self.config.epochs:
                self._epoch()

    def _epoch(self) -> None:
        position, config = self.position, self.config
        self._state.prepared.model.train()
        for module in self._evaluating:
            module.training = False
        length = len(self.train_batches)
        batches = self.train_batches.epoch(position.epoch, start=position.batch)
        while position.batch < length:
            size = min(config.gradient_accumulation_steps, length - position.batch)
            self._step(islice(batches, size), size)
            position.batch += size
            if position.step % config.log_every == 0 or position.step == self._state.total_steps:
                self._log()
            due = config.save_every_steps is not None and position.step % config.save_every_steps == 0
            if due and position.batch < length:
                self._save()
        position.epoch, position.batch = position.epoch + 1, 0
        over = position.epoch == config.epochs
        if config.save_every is not None and (over or due or position.epoch % config.save_every == 0):
            self._save()  # before the evaluation, which may fail
        self._evaluate_if_due()

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]], size: int) -> None:
        """Take one optimizer step on ``size`` batches."""
        state, accelerator = self._state, self.accelerator
        optimizer = state.prepared.optimizer
        for number, (images, labels) in enumerate(batches, start=1):
            with nullcontext() if number == size else accelerator.no_sync(state.prepared.model):
                output = self._train(images, labels, size)
            state.meter.add(output)
            self._images += len(images)
            if self.monitor is not None:
                self.monitor.update(output)
        if self.config.max_grad_norm is not None:
            accelerator.clip_grad_norm_(state.prepared.model.parameters(), self.config.max_grad_norm)
        state.learning_rate = float(optimizer.param_groups[0]["lr"])
        try:
            optimizer.step()
        except DivergedError as error:  # seen at once on the CPU; on an accelerator with the next log line
            raise self._diverged(f"The loss was not finite up to step {state.position.step + 1}") from error
        if not accelerator.optimizer_step_was_skipped:  # fp16: gradients overflowed, the scaler adapts
            state.schedule.step()
            if state.average is not None:
                state.average.update_parameters(state.model)
        state.prepared.model.zero_grad()  # all, as all are clipped: the optimizer may hold some of them only
        state.position.step += 1
        state.position.evaluation = None
        self._bar.update()

    def _train(self, images: Tensor, labels: Tensor, divisor: int) -> StepOutput:
        try:
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
        except RuntimeError as error:
            if "find_unused_parameters" not in str(error):
                raise
            raise UnsupportedModelError(
                "The loss does not depend on all parameters, which several processes need. Freeze those that are not "
                "used, before Trainer(...): parameter.requires_grad_(False). TORCH_DISTRIBUTED_DEBUG=DETAIL names them."
            ) from error

    def _log(self) -> None:
        """Write the averages since the last log line. Everything that waits for the device is here."""
        state, position = self._state, self.position
        values, finite, batches = state.meter.read()
        now = time.perf_counter()
        speed = self._images * self.accelerator.num_processes / max(now - self._since, 1e-9)
        state.meter, self._images, self._since = Meter(), 0, now
        # Under fp16 single overflows are part of the method; nothing but overflows is not.
        if finite < batches and not (state.prepared.precision == "fp16" and finite > 0):
            raise self._diverged(
                f"The loss was not finite in {batches - finite} of the {batches} batches up to step {position.step}"
            )
        values["learning_rate"] = state.learning_rate
        values["images_per_second"] = speed
        self._write("train", values)
        self._bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what}. The last checkpoint: {self.checkpoints.latest() or 'none'}. Try a smaller learning rate, a "
            "max_grad_norm, or mixed_precision='bf16' for 'fp16'."
        )

    def _evaluate_if_due(self) -> None:
        """Evaluate at the end of an epoch, and keep a checkpoint of the best evaluation."""
        position, config = self.position, self.config
        due = position.epoch == config.epochs or position.epoch % config.evaluate_every == 0
        if self.eval_batches is None or not due:
            return
        with self._untimed():
            position.evaluation = found = self.evaluate()
        if self.monitor is not None:
            self.monitor.evaluated(found)
        self._write("eval", found, weights="last" if self._state.average is None else "average")
        metric = config.keep_best
        best = metric is not None and better(metric, found[metric], position.best.get(metric))
        if metric is not None and best:
            position.best[metric] = found[metric]
        if config.save_every is None:
            return
        noted = on_main(self.accelerator, lambda: self.checkpoints.note(self._state))
        if best and not noted:
            self._save()
        on_main(self.accelerator, self.checkpoints.prune)

    def _save(self) -> None:
        with self._untimed():
            path = self.checkpoints.save(self._state)
            on_main(self.accelerator, self.checkpoints.prune)
        self._say(f"Saved {path}.")

    def _write(self, kind: str, values: dict[str, float], **more: Any) -> None:
        position = self.position
        epoch = position.epoch + position.batch / len(self.train_batches)
        line = {"kind": kind, "step": position.step, "epoch": round(epoch, 4), **values, **more}
        on_main(self.accelerator, lambda: self._metrics.write(line))
        self._say(f"Step {position.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=position.step)

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        """Leave the time inside the with-block out of the images per second."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.info(message)


def _evaluating_parts(model: nn.Module) -> list[nn.Module]:
    """Return the modules in evaluation mode within a model in training mode; none, if it is not."""
    if not model.training:
        return []
    return [module for module in walk(model) if not (module.training or isinstance(module, AuxiliaryNorm))]
