"""Whether the loss that a model computes itself is a multiple of cross-entropy: shown on the first batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entprop_wrap.methods.entropy_ascent import evaluating

__all__ = ["Witness"]

#: What the first batches pretend to have as many items as images, times: neither 1 nor likely by chance.
_PRETENDED = 7
#: The same for single images, besides; a loss that divides by items follows the change.
_PRETENDED_ALONE = 5
#: How many images are looked at alone, each with three labels.
_ALONE = 4


class Witness:
    """Looks at the loss a model computes itself, and says of what it is a multiple and how it is averaged.

    A loss that equals cross-entropy, or cross-entropy divided by the number of items, on a whole batch of logits that
    differ is taken for it. Any other must be the same multiple of cross-entropy there and on single images with
    likely and unlikely labels, which entropy, label smoothing, focal and class weights are not.

    Attributes:
        scale: The loss is this times cross-entropy.
        divides_by_items: The model divides the sum of its losses by ``num_items_in_batch``, rather than averaging.
        found: Loss and cross-entropy of the last batch, if they did not fit together.
        sure: The logits differed enough for the comparison to tell cross-entropy from its relatives.
    """

    def __init__(self, labels_name: str, *, pass_items: bool, exact: bool) -> None:
        self.labels_name, self.pass_items, self.exact = labels_name, pass_items, exact
        self.labels: Tensor | None = None
        self.scale, self.divides_by_items = 1.0, False
        self.found: tuple[float, float] | None = None
        self.seen = self.sure = False

    def inputs(self, number: int) -> dict[str, Any]:
        """Return what the model needs to compute a loss on ``number`` images."""
        assert self.labels is not None
        return self._inputs(self.labels[:number], _PRETENDED)  # which images these are does not matter here

    def see(self, output: Any, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Compare the loss in ``output`` with cross-entropy, and where needed that of ``model`` on parts of ``inputs``.

        Args:
            output: Of the first pass, on ``inputs`` and what :meth:`inputs` returned.
            model: The plain model.
            inputs: Images, and what is the same for all images.
        """
        loss, logits = parts(output)
        if loss is None or logits is None or self.labels is None or logits.ndim != 2:
            return
        logits = logits.detach().float()
        value, expected = loss.detach().float().item(), F.cross_entropy(logits, self.labels[: len(logits)]).item()
        tolerance = 1e-4 if self.exact and loss.dtype in (torch.float32, torch.float64) else 1e-2
        self.seen, self.found = True, (value, expected)
        self.sure = logits.std(dim=1).mean().item() > 0.1
        candidates = [(1.0, False), (1.0, True)] if self.pass_items else [(1.0, False)]
        if self.sure and not any(self._fits(value, expected, *candidate, tolerance) for candidate in candidates):
            candidates = list(self._measured(model, inputs, logits, tolerance))
        for scale, divides in candidates:
            if self._fits(value, expected, scale, divides, tolerance):
                self.scale, self.divides_by_items, self.found = scale, divides, None
                return

    @staticmethod
    def _fits(value: float, expected: float, scale: float, divides: bool, tolerance: float) -> bool:
        factor = scale / _PRETENDED if divides else scale
        return abs(value - factor * expected) <= tolerance * factor * expected + 1e-6

    def _measured(
        self, model: nn.Module, inputs: dict[str, Any], logits: Tensor, tolerance: float
    ) -> Iterator[tuple[float, bool]]:
        """Yield by what cross-entropy is multiplied on single images, if by the same everywhere."""
        assert self.labels is not None
        ratios = []
        with torch.no_grad(), evaluating(model):  # leaves running statistics and random numbers alone
            for row, label in enumerate(self.labels[: min(len(logits), _ALONE)]):
                one = {
                    name: value[row : row + 1] if isinstance(value, Tensor) and value.ndim else value
                    for name, value in inputs.items()
                }
                for target in (label, logits[row].argmax(), logits[row].argmin()):
                    loss, found = parts(model(**one, **self._inputs(target[None], _PRETENDED_ALONE)))
                    if loss is None or found is None:
                        return
                    cross_entropy = F.cross_entropy(found.float(), target[None]).item()
                    if cross_entropy > 1e-2:  # else rounding
                        ratios.append(loss.float().item() / cross_entropy)
        ratio = sum(ratios) / max(1, len(ratios))
        if ratio > 0 and max(ratios) - min(ratios) <= tolerance * ratio:
            yield ratio, False
            if self.pass_items:
                yield ratio * _PRETENDED_ALONE, True

    def _inputs(self, labels: Tensor, pretended: int) -> dict[str, Any]:
        items = {"num_items_in_batch": labels.new_tensor(pretended * len(labels))} if self.pass_items else {}
        return {self.labels_name: labels, **items}


def parts(output: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return loss and logits in what a model returned, None for what is not there."""
    return (output.get("loss"), output.get("logits")) if isinstance(output, dict) else (None, None)
