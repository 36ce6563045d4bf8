"""The models under evaluation: what state they must be in, and how they are asked for logits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor, nn

from entprop_wrap.errors import (
    ConfigurationError,
    LabelError,
    ModelOutputError,
    NotWrappedError,
    UnsupportedModelError,
)
from entprop_wrap.robustness.distributed import Batch, gather
from entprop_wrap.robustness.scores import Scores, Tally
from entprop_wrap.utils.model_output import logits_of
from entprop_wrap.utils.modules import check_module, plain_model, walk
from entprop_wrap.wrapping.model import auxiliary, is_wrapped
from entprop_wrap.wrapping.registry import find_registry, find_wrapped

#: What images are evaluated under: ``("fog", 3)``, ``("attack", "PGD-20")``, ``("shift", "sketch")``.
Condition: TypeAlias = tuple[str | int, ...]


class EvaluatedModel:
    """One model, which messages call ``name``, in one domain (None: the main one), and what has been counted of it."""

    def __init__(self, name: str, model: nn.Module, domain: str | None = None) -> None:
        # A DDP forward broadcasts buffers, which would wait for processes that have no batch left.
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.name = name if domain is None else f"{name}, auxiliary {domain!r}"
        self.domain = domain
        self.tallies: dict[Condition, Tally] = {}

    def measure(self, condition: Condition, batch: Batch) -> None:
        """Pass the images of a batch, and count them under ``condition`` unless another process does."""
        found = logits_in(self.model, batch.images, self.domain)
        check_labels_fit(batch.labels, found.shape[1], self.name)
        if condition not in self.tallies:
            self.tallies[condition] = Tally(found.shape[1], found.device)
        if batch.counted:
            self.tallies[condition].add(found, batch.labels)

    def check_logits(self) -> None:
        """Raise :class:`ModelOutputError` if logits so far were not all finite; waits for the device."""
        for condition, tally in self.tallies.items():
            if tally.unusable:
                raise _not_finite(f"{self.name} ({' '.join(map(str, condition))})", str(tally.unusable))

    def scores(self, condition: Condition, name: str = "The data") -> Scores:
        """Return what all processes have counted under a condition; ``name`` is what messages call the data."""
        tally = self.tallies.get(condition)
        return Tally.scores([state for state in gather(tally and tally.state()) if state], name)


def evaluated_models(models: Mapping[str, nn.Module], auxiliaries: bool) -> dict[str, list[EvaluatedModel]]:
    """Return what is evaluated of each model: its main domain first, then its auxiliaries if asked for."""
    if not models:
        raise ConfigurationError("Expected at least one model, found an empty dict.")
    for name, model in models.items():
        check_state(model, name)
    if auxiliaries and not any(map(is_wrapped, models.values())):
        raise NotWrappedError("auxiliaries=True needs a wrapped model, but none is. Evaluate before unwrap().")
    return {
        name: [
            EvaluatedModel(name, model, domain)
            for domain in (None, *(find_registry(model).auxiliaries if auxiliaries and is_wrapped(model) else ()))
        ]
        for name, model in models.items()
    }


def in_domain(model: nn.Module, domain: str | None) -> AbstractContextManager[None]:
    """Return the context in which a model runs in an auxiliary domain; None: the main one, which plain models have."""
    return nullcontext() if domain is None else auxiliary(model, domain)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits ``(N, C)`` of images on any device, at least float32; differentiable where gradients are on.

    Images go to the device of the model, and take the dtype of its parameters: a bfloat16 model takes no float32. The
    model gets a copy, which it may normalise in place.
    """
    like = _first_tensor(model, images)
    output = model(images.to(like.device, like.dtype, copy=True))
    return logits_of(output, len(images), differentiable=False)


def logits_in(model: nn.Module, images: Tensor, domain: str | None) -> Tensor:
    """Return the logits ``(N, C)`` in an auxiliary domain or, None, in the main one, without gradients."""
    with torch.no_grad(), in_domain(model, domain):
        return logits(model, images)


def device_of(model: nn.Module, images: Tensor) -> torch.device:
    """Return the device of a model, or that of the images if it has no tensors."""
    return _first_tensor(model, images).device


def _first_tensor(model: nn.Module, default: Tensor) -> Tensor:
    """Return the first parameter or buffer in a dtype that computations happen in."""
    usual = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor for tensor in tensors if tensor.dtype in usual), default)


def check_state(model: nn.Module, name: str) -> None:
    """Check that a model is a module in evaluation mode and, in this thread, in its main domain."""
    check_module(name, model)
    check_evaluation_mode(model, name)
    if any(norm._entprop_switch.thread().block is not None for norm in find_wrapped(model)[1]):
        raise UnsupportedModelError(
            f"{name} is inside an auxiliary() block. Call it after the with-block, or write auxiliaries=True."
        )


def check_evaluation_mode(model: nn.Module, name: str) -> None:
    """Raise :class:`ConfigurationError` if a model, or a part of it, is in training mode."""
    # What DDP and torch.compile put around a model has a mode of its own, which changes nothing.
    model = plain_model(model)
    if any(module.training for module in walk(model)):
        part = next(key for key, module in model.named_modules() if module.training)
        which = f"{name}: its part {part!r}" if part else name
        raise ConfigurationError(f"{which} is in training mode. Write model.eval() first.")


def check_finite(found: Tensor, name: str) -> None:
    """Raise :class:`ModelOutputError` unless logits ``(N, C)`` are all finite; waits for their device."""
    if not bool(torch.isfinite(found).all()):
        raise _not_finite(name, f"{int((~torch.isfinite(found)).any(1).sum())} of {len(found)}")


def _not_finite(name: str, images: str) -> ModelOutputError:
    return ModelOutputError(
        f"{name}: the logits of {images} images are NaN or infinite. Look for diverged weights, or half precision that "
        "overflows."
    )


def check_labels_fit(labels: Tensor, classes: int, name: str) -> None:
    """Raise :class:`LabelError` unless labels are in [0, classes - 1]; waits for their device."""
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise LabelError(
            f"{name} has {classes} logits, so class indices must be in [0, {classes - 1}]; found [{low}, {high}]. "
            "Evaluate on the data that the model was trained for, with the same order of classes."
        )
