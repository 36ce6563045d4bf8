"""A Hugging Face Trainer's own loss as a function of logits and labels, and the factor with which it trains on it.

A Trainer goes from a batch to a backward in one method: the model's own loss, a label smoother or
``compute_loss_func``, then factors for accumulation and processes that differ between models and versions. None of that
is copied here: the Trainer's own code runs, on a stand-in for the model whose output is the logits that the training
method has computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.containers import plain_model
from entprop_wrap.errors import EntPropError, LabelError, UnsupportedModelError
from entprop_wrap.integrations.hf_trainer_models import Logits, ModelOnImages
from entprop_wrap.integrations.hf_trainer_witness import Witness
from entprop_wrap.losses import mean_by_construction

__all__ = ["TrainerLoss"]


class TrainerLoss:
    """The loss of one training run; :meth:`begin` for each micro-batch, then ``mean`` and ``backward`` serve a step."""

    def __init__(self, trainer: Any, training_step: Callable[..., Tensor], images_name: str, labels_name: str) -> None:
        self.trainer, self.training_step = trainer, training_step
        self.images_name, self.labels_name = images_name, labels_name
        self.from_model = trainer.label_smoother is None and trainer.compute_loss_func is None
        self.witness = Witness(
            labels_name,
            pass_items=trainer.model_accepts_loss_kwargs,
            exact=trainer.accelerator.mixed_precision == "no",
        )
        self.checked = False
        self.model: ModelOnImages | None = None

    def begin(self, model: nn.Module, inputs: dict[str, Any], constants: dict[str, Any], items: Any) -> ModelOnImages:
        """Take a micro-batch and return the model to train on it."""
        if self.model is None or self.model._orig_mod is not model:
            self.model = ModelOnImages(model, self.images_name)
        self.inputs, self.items = inputs, items
        self.factor: Tensor | None = None
        self.labels: Tensor = inputs[self.labels_name]
        self.model.constants = constants
        self.model.train()
        look = self.from_model and not self.witness.sure and self.labels.ndim == 1
        look = look and takes(plain_model(model), self.labels_name)
        self.witness.labels = self.labels.long() if look else None
        self.model.witness = self.witness if look and not self.labels.is_floating_point() else None
        return self.model

    @mean_by_construction  # and may keep count of its calls
    def mean(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the Trainer's loss as a mean over the given rows."""
        if not self.checked or self.witness.found is not None:
            self._check(logits)
        return self._mean(logits, labels)[0]

    def backward(self, loss: Tensor) -> None:
        """Run the Trainer's backward on a mean, with the weight that this micro-batch has in its group."""
        self.trainer.accelerator.backward(loss * self.weight(), **self.options)

    def weight(self) -> Tensor:
        """Return by how much the Trainer multiplies the mean loss of this micro-batch before the backward."""
        if self.factor is None:
            # The same for all logits. Equal ones serve: their loss is far from zero and nothing is lost in dividing.
            logits = torch.zeros(len(self.labels), self.classes, device=self.labels.device)
            calls: list[tuple[Tensor, dict[str, Any]]] = []

            def backward(loss: Tensor, **options: Any) -> None:
                calls.append((loss, options))

            with torch.no_grad():
                with replaced(self.trainer.accelerator, "backward", backward):
                    self.training_step(self._stand_in(logits), dict(self.inputs), self.items)
                if len(calls) != 1 or "learning_rate" in calls[0][1]:
                    raise UnsupportedModelError(
                        f"The Trainer's training step called accelerator.backward {len(calls)} times or steps the "
                        "optimizer there (LOMO). Expected one backward in which gradients accumulate."
                    )
                factor: Tensor = calls[0][0].detach() / self._mean(logits, self.labels)[0]
            self.factor, self.options = factor, calls[0][1]
        return self.factor

    def _stand_in(self, logits: Tensor) -> Logits:
        self.classes = logits.shape[1]
        assert self.model is not None
        return Logits(self.model._orig_mod, logits, self.labels_name, self.witness.scale, self.witness.divides_by_items)

    def _mean(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Logits]:
        # As if these rows were all there is, in one process.
        trainer, stand_in = self.trainer, self._stand_in(logits)
        items = None if self.items is None else torch.tensor(len(logits), device=logits.device)
        inputs = {**self.inputs, self.labels_name: labels}
        with replaced(trainer.args, "average_tokens_across_devices", False), trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(stand_in, inputs, num_items_in_batch=items)
        return loss, stand_in

    def _check(self, logits: Tensor) -> None:
        logits = logits.detach()[:1].new_zeros(len(self.labels), logits.shape[1]).requires_grad_()
        try:
            with torch.enable_grad():
                loss, stand_in = self._mean(logits, self.labels)
                own = [] if stand_in.own_loss is None else [stand_in.own_loss]
                through, *through_own = torch.autograd.grad(loss, [logits, *own], allow_unused=True)
        except EntPropError:
            raise
        except Exception as error:
            self._check_label_type(error)
            raise UnsupportedModelError(
                "The Trainer's loss could not be computed from logits and labels alone "
                f"({type(error).__name__}: {error}). Expected compute_loss() or compute_loss_func to use nothing else "
                "of the model's output."
            ) from error
        if through is None or stand_in.calls != 1:
            raise UnsupportedModelError(
                f"compute_loss() called the model it was given {stand_in.calls} times, or did not use its logits. "
                "Expected one call of model(**inputs) and a loss of its logits."
            )
        if loss.ndim == 0 and not 0 < loss.item() < float("inf"):
            raise UnsupportedModelError(
                f"The Trainer's loss is {loss.item():g} where all logits are equal; expected a finite positive number, "
                "as of cross-entropy, by which to measure how the Trainer weighs it."
            )
        if any(gradient is not None for gradient in through_own):
            self._check_own_loss()
        else:
            self.witness.found, self.witness.sure = None, True  # the model's own loss plays no part
        self.checked = True

    def _check_label_type(self, error: Exception) -> None:
        """Raise :class:`LabelError` if the labels are of a kind on which the Trainer's loss fails."""
        found = f"The batch's {self.labels_name!r} are {self.labels.dtype} of shape {tuple(self.labels.shape)}"
        if self.labels.is_floating_point() and self.trainer.label_smoother is not None:
            raise LabelError(
                f"{found}: soft labels, while the Trainer's label smoothing takes class indices only (int64). Write "
                "TrainingArguments(label_smoothing_factor=0), and compute_loss_func=lambda outputs, labels, "
                "num_items_in_batch=None: torch.nn.functional.cross_entropy(outputs.logits, labels, "
                "label_smoothing=0.1), say."
            ) from error
        if not self.labels.is_floating_point() and self.labels.dtype != torch.int64:
            raise LabelError(
                f"{found}, on which the Trainer's loss fails ({error}). Expected class indices as int64: write "
                f"batch[{self.labels_name!r}].long() in the data collator."
            ) from error

    def _check_own_loss(self) -> None:
        fix = (
            "Pass the loss to the Trainer, as a function of logits: compute_loss_func=lambda outputs, labels, "
            "num_items_in_batch=None: torch.nn.functional.cross_entropy(outputs.logits, labels), say."
        )
        name = type(plain_model(self.model._orig_mod)).__name__ if self.model is not None else "The model"
        if self.labels.is_floating_point():
            raise LabelError(
                f"Labels are {self.labels.dtype}, on which Hugging Face models compute a binary or a regression loss. "
                f"Expected class indices (int64). For soft labels: {fix}"
            )
        if not self.witness.seen:
            raise UnsupportedModelError(f"{name} returned no loss for its labels. {fix}")
        if self.witness.found is not None:
            loss, expected = self.witness.found
            raise UnsupportedModelError(
                f"The loss of {name} is {loss:.5g} on a batch with cross-entropy {expected:.5g}, and not shown to be "
                f"a multiple of it: another loss cannot be computed for mixed or selected images. {fix}"
            )


def takes(model: nn.Module, name: str) -> bool:
    """Say whether ``model`` can be called with an argument of this name."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute inside the with-block."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
