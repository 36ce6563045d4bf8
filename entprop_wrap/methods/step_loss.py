"""The loss of a training loop inside a step: what it may ask for, and what shows in its first call."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entprop_wrap.data.validation import Checker
from entprop_wrap.errors import ConfigurationError, EntPropError, ModelOutputError
from entprop_wrap.functional.losses import Loss, Pass, asked, is_mean, takes_any_targets
from entprop_wrap.utils.model_output import raw_logits

__all__ = ["StepLoss", "check_scalar", "refuse_idle_heads"]


class StepLoss:
    """``(logits, labels) -> scalar``: the given loss, with whatever else it asks for of the pass of these logits.

    Only a call shows whether a loss is a mean over rows; that is looked at once for each model.
    """

    def __init__(self, loss: Loss, checker: Checker, batch: int) -> None:
        self.loss, self.checker, self.batch = loss, checker, batch
        self.asked = asked(loss, Pass.__dataclass_fields__, 2)
        self.takes_any_targets = takes_any_targets(loss)
        self._passes: deque[tuple[Tensor, Any, Tensor]] = deque(maxlen=2)  # of one backward: TRADES has two

    def passed(self, logits: Tensor, output: Any, images: Tensor) -> None:
        """Keep what a pass gave until the next backward, if the loss asks for it."""
        if self.asked:
            self._passes.append((logits, output, images))

    def forget(self) -> None:
        """Drop the passes: their graphs are gone."""
        self._passes.clear()

    def at(self, rows: Tensor) -> Loss:
        """Return the loss of labels that stand at ``rows`` of the batch."""
        return partial(self, rows=rows)

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the loss.

        Raises:
            ConfigurationError: It is not a mean over rows, or its logits are not those of a pass.
        """
        if (rows is not None or len(logits) < self.batch) and getattr(self.loss, "num_splits", 1) > 1:
            raise ConfigurationError(
                f"{type(self.loss).__name__} takes whole images with their {self.loss.num_splits} splits; the method "  # type: ignore[attr-defined]
                "mixes or selects single images. Leave out --jsd-loss and --aug-splits, or train with AdvProp."
            )
        more = self._more(logits, rows) if self.asked else {}
        try:
            value = self.loss(logits, labels, **more)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            if len(logits) == self.batch or isinstance(error, (EntPropError, torch.OutOfMemoryError)):
                raise
            raise ConfigurationError(
                f"loss failed on {len(logits)} of the batch's {self.batch} images ({type(error).__name__}: {error}). "
                "The method calls it on parts of a batch: expected a mean over whatever rows it is given."
            ) from error
        if not self.checker.loss_seen:
            check_scalar(value)
            if not is_mean(self.loss, logits, labels, value, more):
                raise ConfigurationError(
                    "loss must return the mean over the images it is given; found one that doubles where every image "
                    "comes twice. Write reduction='mean', and divide by no number of images of your own: parts of a "
                    "batch are weighed by how many images they hold."
                )
            self.checker.loss_seen = True
        return value

    def _more(self, logits: Tensor, rows: Tensor | None) -> dict[str, Any]:
        found = next((kept for kept in self._passes if kept[0] is logits), None)
        if found is None:
            raise ConfigurationError(
                f"loss asks for {sorted(self.asked)} of logits that are not what step.forward() returned for the next "
                "backward. Expected step.loss(step.forward(images), labels) in the method."
            )
        rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
        given = Pass(outputs=found[1], images=found[2], rows=rows)
        return {name: getattr(given, name) for name in self.asked}


def check_scalar(loss: object) -> None:
    """Raise :class:`ConfigurationError` unless ``loss`` is what a loss returns: a tensor without dimensions."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigurationError(
            f"loss must return a scalar tensor, the mean over the batch; found {found}. Leave out reduction='none'."
        )


def refuse_idle_heads(
    output: Any,
    fix: str = "Write a loss that takes all that the model returned, loss=lambda logits, labels, outputs: ..., or "
    "switch the heads off (aux_logits=False).",
) -> None:
    """Raise :class:`ModelOutputError` if a model returns more than logits, with parameters that these do not train.

    GoogLeNet's auxiliary classifiers, the distillation head of DeiT, the projection of a contrastive loss. ``fix`` says
    what to write instead.
    """
    logits: Tensor = raw_logits(output)
    others = [(name, t) for name, t in _tensors(output) if t.requires_grad and t is not logits]
    if not others:
        return
    trained = _leaves(logits)
    # Outputs of a compiled model come from one node, so that all seem to be trained: there the shape tells.
    idle = [
        f"{name} {tuple(tensor.shape)}"
        for name, tensor in others
        if not _leaves(tensor) <= trained or (tensor.grad_fn is logits.grad_fn and tensor.shape == logits.shape)
    ]
    if idle:
        raise ModelOutputError(
            f"The model returns heads that a loss of the logits does not train: {', '.join(idle)}. {fix}"
        )


def _tensors(output: Any, name: str = "outputs") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from _tensors(value, f"{name}[{key!r}]")
    elif isinstance(output, (list, tuple)):
        fields = getattr(output, "_fields", None)
        for place, value in enumerate(output):
            yield from _tensors(value, f"{name}.{fields[place]}" if fields else f"{name}[{place}]")


def _leaves(tensor: Tensor) -> set[int]:
    """Return the ids of the leaves that a backward of ``tensor`` reaches."""
    leaves: set[int] = set()
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.add(id(variable))
        stack.extend(following for following, _ in node.next_functions)
    return leaves
