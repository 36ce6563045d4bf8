"""One ``fit`` of Lightning with a training method: what takes the place of hooks of the LightningModule meanwhile.

Lightning calls ``training_step``, then zeroes gradients, then runs one backward, which under DDP must come after the
forward of the container. A method has several backwards. So they all run in ``training_step``, where DDP does not
reduce yet, after gradients were zeroed there; and the loss that Lightning is given has a backward that adds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from entprop_wrap.containers import plain_model
from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.integrations.lightning_checks import batch_of, find_classifier, read_batch
from entprop_wrap.integrations.lightning_files import Copies, join, separate
from entprop_wrap.integrations.lightning_models import LogitsOf, ModelInContext, already_done, stand_in
from entprop_wrap.losses import Loss
from entprop_wrap.state_dicts import is_auxiliary_key
from entprop_wrap.step import StepOutput
from entprop_wrap.training import training_step
from entprop_wrap.wrapping import is_wrapped, unwrap

__all__ = ["LightningRun"]

_HOOKS = ("configure_model", "on_save_checkpoint", "on_load_checkpoint", "training_step", "optimizer_zero_grad")


class LightningRun:
    """Stands in for hooks of ``module`` from the beginning to the end of one ``fit``."""

    def __init__(self, callback: Any, trainer: Any, module: Any, kept: Copies | None) -> None:
        self.callback, self.trainer, self.module, self.kept = callback, trainer, module, kept
        self.hooks = {name: getattr(module, name) for name in _HOOKS}
        self.before = {name: vars(module)[name] for name in _HOOKS if name in vars(module)}
        self.takes_index = is_param_in_hook_signature(self.hooks["training_step"], "batch_idx", min_args=2)
        self.wrapped: nn.Module | None = None
        self.model: ModelInContext | None = None
        for name in _HOOKS:
            setattr(module, name, getattr(self, name))

    def __deepcopy__(self, memo: Any) -> LightningRun:
        return self  # copies of the module that are made meanwhile are not trained

    def end(self) -> Copies | None:
        """Give the module its hooks back, unwrap the model if this run wrapped it, and return its copies."""
        for name in _HOOKS:
            if name in self.before:
                setattr(self.module, name, self.before[name])
            else:
                delattr(self.module, name)
        if self.wrapped is None:
            return None
        copies = Copies.of(self.module)
        unwrap(self.wrapped)
        return copies

    def configure_model(self) -> None:
        """Wrap the model after the module has made it: the last moment before there are optimizers."""
        self.hooks["configure_model"]()
        if self.model is not None:
            return
        self.name, self.classifier = find_classifier(self.module, self.callback.model)
        if self.callback.wrap(self.classifier):
            self.wrapped = self.classifier
            if self.kept is not None:
                self.kept.restore(self.module)
        self.model = ModelInContext(self.classifier, self.trainer.precision_plugin.forward_context)
        own = getattr(self.module, "criterion", None) or getattr(self.module, "loss_fn", None)
        self.loss: Loss = self.callback.loss or (own if callable(own) else F.cross_entropy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the copies apart from the plain module's state."""
        separate(checkpoint)
        self.hooks["on_save_checkpoint"](checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put them together again."""
        self.hooks["on_load_checkpoint"](checkpoint)
        if is_wrapped(self.module):
            join(checkpoint, self.module)

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Do nothing: Lightning calls this when the gradients of the step are there."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Run the passes of the method; return the loss that was minimised, in what the module's own step returns."""
        trainer, model = self.trainer, self.model
        assert model is not None
        images, labels = read_batch(batch)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.hooks["optimizer_zero_grad"](trainer.current_epoch, batch_idx, trainer.optimizers[0])
        model.training = self.classifier.training
        with torch.autocast(images.device.type, enabled=False):  # the model and the loss have it, backwards have not
            output = training_step(
                model,
                images,
                labels,
                method=self.callback.method,
                pixel_space=self.callback.pixel_space,
                loss=self._mean,
                backward=self._backward,
            )
        look = images.device.type == "cpu" or batch_idx % trainer.log_every_n_steps == 0
        if look and output.checker is not None:
            output.checker.raise_pending()
        result = self._own_step(batch, batch_idx, output, check=look and self.callback.loss is None)
        self._log(output)
        loss = already_done(output.loss, self._reduced())
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _mean(self, logits: Tensor, labels: Tensor) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            return self.loss(logits, labels)

    def _backward(self, loss: Tensor) -> None:
        # As Lightning does it, without the hooks around a backward, which come once and last.
        plugin, trainer = self.trainer.precision_plugin, self.trainer
        loss = loss / trainer.accumulate_grad_batches
        if getattr(plugin, "scaler", None) is not None:
            loss = plugin.scaler.scale(loss)
        plugin.backward(loss, self.module, trainer.optimizers[0])

    def _own_step(self, batch: Any, batch_idx: int, output: StepOutput, check: bool) -> Any:
        assert self.model is not None
        rows = len(output.logits)
        batch = batch_of(batch, rows)
        images, labels = read_batch(batch)
        replacement = LogitsOf(self.classifier, images, self.model.kind(output.logits))
        with torch.no_grad(), stand_in(self.module, self.name, replacement):
            result = self.hooks["training_step"](batch, *([batch_idx] if self.takes_index else []))
            expected = self._mean(output.logits, labels if labels.is_floating_point() else labels.long())
        loss = result.get("loss") if isinstance(result, Mapping) else result
        where = type(self.module).__name__
        if replacement.calls != 1:
            what = "forward()" if self.name == "self" else repr(self.name)
            raise UnsupportedModelError(
                f"training_step of {where} called {what} {replacement.calls} times. Expected one call, images in and "
                "logits out; if another part does that, write EntPropLightningCallback(..., model=<its name>)."
            )
        if not isinstance(loss, Tensor) or loss.ndim:
            found = "None" if loss is None else type(loss).__name__
            raise UnsupportedModelError(
                f"training_step of {where} returned {found}. Expected a scalar loss, "
                "or a dict with one under 'loss'; a batch cannot be skipped after its passes."
            )
        if check and not _equal(loss.item(), expected.item()):
            raise UnsupportedModelError(
                f"training_step of {where} returns {loss.item():.6g} on logits for which the loss, "
                f"{_name(self.loss)}, is {expected.item():.6g}. Write EntPropLightningCallback(..., loss=) with the "
                "function of (logits, labels) to train on."
            )
        return result

    def _log(self, output: StepOutput) -> None:
        values = {"main_loss": output.main_loss, "main_entropy": output.entropy.mean()}
        if output.aux_loss is not None and output.aux_logits is not None:
            values["aux_loss"] = output.aux_loss
            values["aux_entropy"] = torch.special.entr(output.aux_logits.float().softmax(-1)).sum(-1).mean()
        self.module.log_dict(values, batch_size=len(output.logits))

    def _reduced(self) -> list[nn.Parameter]:
        if not isinstance(self.trainer.strategy, DDPStrategy):
            return []
        return [
            parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and (parameter.grad is not None or is_auxiliary_key(name))
        ]


def _equal(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-6) or (math.isnan(found) and math.isnan(expected))


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", None) or type(plain_model(loss) if isinstance(loss, nn.Module) else loss).__name__
