"""The loss of a training loop inside a step, with whatever it asks for of the pass of its logits."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entprop_wrap.data.validation import Checker
from entprop_wrap.errors import ConfigurationError, EntPropError
from entprop_wrap.functional.losses import Loss, Pass, takes_any_targets
from entprop_wrap.methods.loss_checks import check_scalar, is_mean
from entprop_wrap.utils.options import asked


class StepLoss:
    """``(logits, labels) -> scalar``: the given loss, with whatever else it asks for of the pass of these logits.

    Only a call shows whether a loss is a mean over rows; that is looked at once for each model and loss.
    """

    def __init__(self, loss: Loss, checker: Checker, batch: int) -> None:
        self.loss, self.checker, self.batch = loss, checker, batch
        self.asked = asked(loss, Pass.__dataclass_fields__, 2)
        self.takes_any_targets = takes_any_targets(loss)
        function = getattr(loss, "__func__", loss)  # of a method, which is another object at each look
        #: What tells this loss from others: a function's code, as a lambda in a loop is another function in each step.
        self.identity: object = getattr(function, "__code__", function)
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
        """Return the loss."""
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
