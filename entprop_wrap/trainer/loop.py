"""The training loop: epochs, accumulation, logs, evaluations and checkpoints, from wherever the run stands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from entprop_wrap.errors import DivergedError
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.trainer.checkpoint import CheckpointFolder, better
from entprop_wrap.trainer.config import TrainerConfig
from entprop_wrap.trainer.data_loader import Batches
from entprop_wrap.trainer.ema import update_average
from entprop_wrap.trainer.metrics import Meter, MetricsFile
from entprop_wrap.trainer.run_state import RunState
from entprop_wrap.utils.files import on_main
from entprop_wrap.utils.modules import walk
from entprop_wrap.wrapping.switched_norm import AuxiliaryNorm

if TYPE_CHECKING:
    from entprop_wrap.diagnostics import Monitor

__all__ = ["Loop", "evaluating_parts"]

logger = logging.getLogger(__name__)

#: ``(images, labels, divisor of the loss) -> what the step computed``; leaves gradients.
Train = Callable[[Tensor, Tensor, int], StepOutput]


class Loop:
    """One run of training.

    Args:
        config: Options.
        state: All that changes; advanced in place.
        batches: Training data.
        train: Runs the passes of one batch.
        evaluate: Returns the metrics of the evaluation data; None without such data.
        checkpoints: Where to save.
        metrics: Where to write metrics.
        monitor: Sees the steps and evaluations of the first process.
        evaluating: Modules to leave in evaluation mode.
    """

    def __init__(
        self,
        config: TrainerConfig,
        state: RunState,
        batches: Batches,
        train: Train,
        evaluate: Callable[[], dict[str, float]] | None,
        checkpoints: CheckpointFolder,
        metrics: MetricsFile,
        monitor: Monitor | None = None,
        evaluating: Sequence[nn.Module] = (),
    ) -> None:
        self.config, self.state, self.batches, self.train, self.evaluate = config, state, batches, train, evaluate
        self.checkpoints, self.metrics = checkpoints, metrics
        self.accelerator = state.accelerator
        self.monitor = monitor if self.accelerator.is_main_process else None
        self.evaluating = evaluating
        self.timer = _Timer()

    def run(self) -> None:
        """Train to the end of the last epoch.

        Raises:
            DivergedError: The loss is not finite.
        """
        position = self.state.position
        visible = self.config.progress and self.accelerator.is_main_process
        with tqdm(total=self.state.total_steps, initial=position.step, disable=not visible, unit="step") as self.bar:
            self.state.prepared.optimizer.zero_grad()
            self.timer.start()
            self.untimed = self.state.meter.images  # of a window that began before the run was resumed
            if position.epoch and not position.batch and position.evaluation is None:
                self._evaluate()  # which was interrupted
            while position.epoch < self.config.epochs:
                self._epoch()

    def _epoch(self) -> None:
        position, config = self.state.position, self.config
        self.state.prepared.model.train()
        for module in self.evaluating:
            module.training = False
        length = len(self.batches)
        batches = self.batches.epoch(position.epoch, start=position.batch)
        while position.batch < length:
            size = min(config.gradient_accumulation_steps, length - position.batch)
            self._step(islice(batches, size), size)
            position.batch += size
            if position.step % config.log_every == 0 or position.step == self.state.total_steps:
                self._log()
            due = config.save_every_steps is not None and position.step % config.save_every_steps == 0
            if due and position.batch < length:
                self._save()
        position.epoch, position.batch = position.epoch + 1, 0
        self._end_epoch(due)

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]], size: int) -> None:
        """Take one optimizer step on ``size`` batches."""
        state, accelerator = self.state, self.accelerator
        optimizer = state.prepared.optimizer
        for number, (images, labels) in enumerate(batches, start=1):
            last = number == size
            with nullcontext() if last else accelerator.no_sync(state.prepared.model):
                output = self.train(images, labels, size)
            state.meter.add(output, len(images))
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
                update_average(state.average, state.model)
        optimizer.zero_grad()
        state.position.step += 1
        state.position.evaluation = None
        self.bar.update()

    def _log(self) -> None:
        """Write the averages since the last log line. Everything that waits for the device is here."""
        state, position = self.state, self.state.position
        values, finite, batches = state.meter.read(self.accelerator)
        images, state.meter, self.untimed = state.meter.images - self.untimed, Meter(), 0
        seconds = self.timer.lap()
        # Under fp16 single overflows are part of the method; a window of nothing else is not.
        if finite < batches and not (state.prepared.precision == "fp16" and finite > 0):
            raise self._diverged(
                f"The loss was not finite in {batches - finite} of the {batches} batches up to step {position.step}"
            )
        values["learning_rate"] = state.learning_rate
        values["images_per_second"] = images * self.accelerator.num_processes / seconds
        self._write("train", values)
        self.bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what}. The last checkpoint: {self.checkpoints.latest() or 'none'}. Try a smaller learning rate, a "
            "max_grad_norm, or mixed_precision='bf16' for 'fp16'."
        )

    def _end_epoch(self, save_due: bool) -> None:
        position, config = self.state.position, self.config
        over = position.epoch == config.epochs
        if config.save_every is not None and (over or save_due or position.epoch % config.save_every == 0):
            self._save()  # before the evaluation, which may fail
        self._evaluate()

    def _evaluate(self) -> None:
        """Evaluate, if that is due at the end of this epoch."""
        position, config = self.state.position, self.config
        over = position.epoch == config.epochs
        if self.evaluate is None or not (over or position.epoch % config.evaluate_every == 0):
            return
        with self.timer.paused():
            position.evaluation = self.evaluate()
        if self.monitor is not None:
            self.monitor.evaluated(position.evaluation)
        weights = "last" if self.state.average is None else "average"
        self._write("eval", position.evaluation, weights=weights)
        best = self._is_best(position.evaluation)
        if config.save_every is None:
            return
        noted = on_main(self.accelerator, lambda: self.checkpoints.note(self.state))
        if best and not noted:
            self._save()
        on_main(self.accelerator, self.checkpoints.prune)

    def _is_best(self, evaluation: dict[str, float]) -> bool:
        metric, best = self.config.keep_best, self.state.position.best
        if metric is None or not better(metric, evaluation[metric], best.get(metric)):
            return False
        best[metric] = evaluation[metric]
        return True

    def _save(self) -> None:
        with self.timer.paused():
            path = self.checkpoints.save(self.state)
            on_main(self.accelerator, self.checkpoints.prune)
        if self.accelerator.is_main_process:
            logger.info("Saved %s.", path)

    def _write(self, kind: str, values: dict[str, float], **more: Any) -> None:
        position = self.state.position
        epoch = position.epoch + position.batch / len(self.batches)
        line = {"kind": kind, "step": position.step, "epoch": round(epoch, 4), **values, **more}
        on_main(self.accelerator, lambda: self.metrics.write(line))
        if self.accelerator.is_main_process:
            logger.info(
                "Step %d: %s", position.step, ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            )
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=position.step)


def evaluating_parts(model: nn.Module) -> list[nn.Module]:
    """Return the modules in evaluation mode within a model in training mode; none, if it is not."""
    if not model.training:
        return []
    return [module for module in walk(model) if not (module.training or isinstance(module, AuxiliaryNorm))]


class _Timer:
    """Wall time of training, without evaluating and saving."""

    def start(self) -> None:
        self.since = time.perf_counter()

    def lap(self) -> float:
        """Return seconds since the last lap, above 0."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return max(seconds, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the with-block out."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began
