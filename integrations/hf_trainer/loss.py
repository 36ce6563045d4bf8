"""The Hugging Face Trainer's own loss as a function of logits and labels, and the weight with which it trains on it.

The Trainer has a loss (the model's own, a label smoother, ``compute_loss_func`` or ``compute_loss``) and factors for
accumulation and processes, which differ between models and versions. None of them is repeated here: the Trainer's own
code runs on a stand-in for the model, which returns the logits that the training method has computed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from entprop_wrap.errors import ConfigurationError, EntPropError, LabelError, UnsupportedModelError
from entprop_wrap.functional.losses import mean_by_construction
from entprop_wrap.utils.graphs import leaves_of
from entprop_wrap.utils.modules import plain_model, replaced

_FIX = (
    "Pass the loss to the Trainer, as a function of logits: compute_loss_func=lambda outputs, labels, "
    "num_items_in_batch=None: torch.nn.functional.cross_entropy(outputs.logits, labels), for example."
)


class TrainerLoss:
    """The loss of one training run: :meth:`begin` for each micro-batch, then ``mean`` and ``backward`` serve a step.

    Args:
        trainer: The Trainer.
        own_step: Its training step, as it would be without us: ``(model, inputs, num_items_in_batch) -> loss``.
    """

    #: By which the Trainer multiplies the mean loss of this micro-batch: a tensor, from the first call of :meth:`mean`.
    factor: Any = None

    def __init__(self, trainer: Any, own_step: Callable[..., Tensor]) -> None:
        self.trainer, self.own_step = trainer, own_step
        # "pixel_values" is what image processors make; Perceiver takes it beside its main input.
        named = "pixel_values" in inspect.signature(trainer.model.forward).parameters
        self.images_name = "pixel_values" if named else getattr(trainer.model, "main_input_name", "pixel_values")
        self.labels_name = (trainer.label_names or ["labels"])[0]
        self.checked = False
        self.own_loss: _ModelsOwnLoss | None = None
        if trainer.label_smoother is None and trainer.compute_loss_func is None:
            self.own_loss = _ModelsOwnLoss(trainer, self.labels_name)

    def begin(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> tuple[nn.Module, Tensor, Tensor]:
        """Take a micro-batch; return the model to train on it, images in and output out, the images and the labels."""
        images, self.labels, constants = _split(inputs, self.images_name, self.labels_name)
        self.inputs, self.items, self.factor = inputs, items, None
        self.model = _ModelOnImages(model, self, constants)
        return self.model.train(), images, self.labels

    @mean_by_construction  # and may keep count of its calls
    def mean(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the Trainer's loss as a mean over the given rows."""
        if self.factor is None:
            self.factor = self._weigh(logits.shape[1])
        return self._mean(logits, labels)[0]

    def backward(self, loss: Tensor) -> None:
        """Run the Trainer's backward on a mean, with the weight that this micro-batch has in its group."""
        self.trainer.accelerator.backward(loss * self.factor)

    def _mean(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, _Logits]:
        # As if these rows were all there is, in one process.
        trainer, stand_in = self.trainer, self._stand_in(logits)
        items = None if self.items is None else torch.tensor(len(logits), device=logits.device)
        alone = replaced(vars(trainer.args), "average_tokens_across_devices", False)
        with alone, trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(stand_in, self._inputs(labels), num_items_in_batch=items)
        return loss, stand_in

    def _stand_in(self, logits: Tensor) -> _Logits:
        by_items = self.own_loss is not None and self.own_loss.by_items
        return _Logits(self.model._orig_mod, logits, self.labels_name, by_items)

    def _inputs(self, labels: Tensor) -> dict[str, Any]:
        images = self.inputs[self.images_name]
        # The rows of a pass are not those of the batch: they are mixed, selected, or sorted by entropy.
        hidden = images.new_zeros(()).expand(len(labels), *images.shape[1:]).as_subclass(_ForTheModelOnly)
        return {**self.inputs, self.images_name: hidden, self.labels_name: labels}

    def _weigh(self, classes: int) -> Tensor:
        """Return the factor of this micro-batch; in the first one, check the loss."""
        # It is the same for all logits. Equal ones serve: their loss is far from zero and nothing is lost in dividing.
        logits = torch.zeros(len(self.labels), classes, device=self.labels.device)
        if not self.checked:
            self._check(logits.clone().requires_grad_())
        if self.own_loss is not None:
            self.own_loss.check(self.labels)
        given: list[Tensor] = []
        with torch.no_grad():
            with replaced(vars(self.trainer.accelerator), "backward", lambda loss, **options: given.append(loss)):
                self.own_step(self._stand_in(logits), self._inputs(self.labels), self.items)
            if len(given) != 1:
                raise UnsupportedModelError(
                    f"The Trainer's training step called accelerator.backward {len(given)} times; expected once."
                )
            return given[0] / self._mean(logits, self.labels)[0]

    def _check(self, logits: Tensor) -> None:
        """Raise unless the Trainer's loss is a function of ``logits`` and labels that this step can use."""
        try:
            with torch.enable_grad():
                loss, stand_in = self._mean(logits, self.labels)
                own = [] if stand_in.own_loss is None else [stand_in.own_loss]
                through, *through_own = torch.autograd.grad(loss, [logits, *own], allow_unused=True)
        except EntPropError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"The Trainer's loss could not be computed from logits and {self.labels.dtype} labels alone "
                f"({type(error).__name__}: {error}). Expected compute_loss() or compute_loss_func to use nothing else, "
                "and class indices to be int64."
            ) from error
        reached = leaves_of(loss)
        if any(id(parameter) in reached for parameter in self.trainer.model.parameters()):
            raise UnsupportedModelError(
                "compute_loss() adds a term of the model's weights, as a penalty is, which every pass of a step would "
                "train. Expected a loss of logits and labels: leave penalties to the optimizer (weight_decay), or "
                "write a loop of your own."
            )
        if through is None or stand_in.calls != 1:
            raise UnsupportedModelError(
                f"compute_loss() called the model it was given {stand_in.calls} times, or did not use its logits. "
                "Expected one call of model(**inputs) and a loss of its logits."
            )
        if loss.ndim == 0 and not 0 < loss.item() < math.inf:
            raise UnsupportedModelError(
                f"The Trainer's loss is {loss.item():g} where all logits are equal, expected a finite positive number "
                "as of cross-entropy."
            )
        if all(gradient is None for gradient in through_own):
            self.own_loss = None  # it plays no part
        self.checked = True


class _ModelsOwnLoss:
    """The loss that a model computes itself, compared with cross-entropy until a difference would show."""

    def __init__(self, trainer: Any, labels_name: str) -> None:
        model = plain_model(trainer.model)
        parameters = inspect.signature(model.forward).parameters
        self.name, self.labels_name = type(model).__name__, labels_name
        any_name = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        self.takes_labels = any_name or labels_name in parameters
        self.takes_items: bool = trainer.model_accepts_loss_kwargs
        self.tolerance = 1e-4 if trainer.accelerator.mixed_precision == "no" else 1e-2
        self.by_items = False  # whether the model divides the sum of its losses by items, rather than averaging
        self.known = False
        self.problem = "is not in its output"

    def looks_at(self, labels: Tensor) -> bool:
        """Return whether the model is to be given ``labels`` of a micro-batch."""
        return self.takes_labels and not self.known and labels.ndim == 1 and not labels.is_floating_point()

    def run(self, model: nn.Module, inputs: dict[str, Any], number: int, labels: Tensor) -> Any:
        """Return the output of a pass of ``number`` images, and compare the loss in it; any ``labels`` will do."""
        labels = labels.long().repeat(-(-number // len(labels)))[:number]  # a lagged pass has more images than these
        items = {"num_items_in_batch": labels.new_tensor(2 * number)} if self.takes_items else {}
        try:
            output = model(**inputs, **{self.labels_name: labels}, **items)
        except IndexError:  # of a loss on labels that do not fit; the step finds the logits, and says so
            return model(**inputs)
        loss, logits = (output.get("loss"), output.get("logits")) if isinstance(output, dict) else (None, None)
        if loss is None or logits is None or logits.ndim != 2:
            return output
        logits = logits.detach().float()
        value, expected = loss.item(), F.cross_entropy(logits, labels).item()
        tolerance = self.tolerance if loss.dtype in (torch.float32, torch.float64) else 1e-2
        averages, self.by_items = (
            math.isclose(value, expected * share, rel_tol=tolerance, abs_tol=1e-6) for share in (1.0, 0.5)
        )
        self.problem = (
            "" if averages or self.by_items else f"is {value:.5g} on a batch with cross-entropy {expected:.5g}"
        )
        self.known = logits.std(dim=1).mean().item() > 0.1  # equal logits hide other terms
        return output

    def check(self, labels: Tensor) -> None:
        """Raise unless the loss was seen to be cross-entropy."""
        if labels.is_floating_point():
            raise LabelError(
                f"Labels are {labels.dtype}, on which Hugging Face models compute a binary or a regression loss. "
                f"Expected class indices (int64). For soft labels: {_FIX}"
            )
        if self.problem:
            raise UnsupportedModelError(
                f"The loss of {self.name} {self.problem}: another loss cannot be computed for mixed or selected "
                f"images. {_FIX}"
            )


class _ModelOnImages(nn.Module):
    """The Trainer's (prepared) model as the step calls it: images in, output with logits out."""

    def __init__(self, model: nn.Module, loss: TrainerLoss, constants: dict[str, Any]) -> None:
        super().__init__()
        self._orig_mod = model  # the name that compiled modules use: whatever looks for the plain model or DDP finds it
        self.images_name, self.labels, self.constants = loss.images_name, loss.labels, constants
        own = loss.own_loss
        self.own_loss = own if own is not None and own.looks_at(loss.labels) else None

    def forward(self, images: Tensor) -> Any:
        """Return the model's output for ``images``."""
        inputs, own = {self.images_name: images, **self.constants}, self.own_loss
        self.own_loss = None  # the first pass also shows the model's own loss
        return own.run(self._orig_mod, inputs, len(images), self.labels) if own else self._orig_mod(**inputs)


class _Logits:
    """Stands in for the model while the Trainer computes a loss: it returns ``logits``, whatever goes in.

    It counts its ``calls``; all else, as its parameters and parts, is the model's.
    """

    def __init__(self, model: nn.Module, logits: Tensor, labels_name: str, by_items: bool) -> None:
        self.stands_for, self.logits, self.labels_name, self.by_items = model, logits, labels_name, by_items
        self.calls = 0
        self._modules: dict[str, nn.Module] = {}  # in which accelerate looks for what is compiled
        self.own_loss: Tensor | None = None  # that the model would have computed itself, given labels

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)

    def train(self, mode: bool = True) -> _Logits:
        """Leave the model in the mode that the step has put it in."""
        return self

    def _get_name(self) -> str:
        return type(plain_model(self.stands_for)).__name__

    def forward(self, *args: Any, **inputs: Any) -> ImageClassifierOutput:
        """Return the logits, and the model's own kind of loss if there are labels."""
        self.calls += 1
        labels, items = inputs.get(self.labels_name), inputs.get("num_items_in_batch")
        if labels is not None:
            self.own_loss = F.cross_entropy(self.logits, labels)
            if self.by_items and items is not None:
                self.own_loss = self.own_loss * (len(self.logits) / items)
        return ImageClassifierOutput(loss=self.own_loss, logits=self.logits)

    __call__ = forward


class _ForTheModelOnly(Tensor):
    """Images in the inputs of ``compute_loss``: they may be passed on to the model, have a shape, and nothing else."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("to", "cuda", "contiguous", "detach"):  # from place to place
            return args[0]
        if name in ("size", "dim", "__len__") or name == "__get__":  # shape, device, dtype, ...
            return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise UnsupportedModelError(
            f"compute_loss() reads the images itself ({name}), as a teacher's loss does. The images of a pass are "
            "mixed, selected or sorted, so a loss may read logits and labels only. Write a loop of your own with "
            "entprop.training_step, or distil into soft labels in the dataset."
        )


def _split(inputs: dict[str, Any], images_name: str, labels_name: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the images, the labels and what else is in a batch."""
    if missing := [name for name in (images_name, labels_name) if inputs.get(name) is None]:
        raise ConfigurationError(
            f"The batch has no {' and no '.join(map(repr, missing))}, found {', '.join(map(repr, inputs))}. Name them "
            "so in the data collator; if the columns exist, write TrainingArguments(..., remove_unused_columns=False)."
        )
    others = {name: value for name, value in inputs.items() if name not in (images_name, labels_name)}
    if tensors := [name for name, value in others.items() if isinstance(value, Tensor) and value.ndim]:
        raise ConfigurationError(
            f"The batch has {tensors[0]!r} beside images and labels, which are mixed and selected: leave it out."
        )
    return inputs[images_name], inputs[labels_name], others
