"""What stands around and in for a model in the Hugging Face Trainer's step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from entprop_wrap.containers import plain_model

__all__ = ["Logits", "ModelOnImages", "Witness"]

#: What the first batches pretend to have as many items as images, times: neither 1 nor likely by chance.
_PRETENDED = 3


class ModelOnImages(nn.Module):
    """The Trainer's (prepared) model as the step calls it: images in, output with logits out.

    It holds the model under the name that compiled modules use, so that everything that looks for the plain model or
    for DDP inside a container finds it.

    Attributes:
        constants: What else the batch held for the model, such as ``interpolate_pos_encoding``.
        witness: Sees the next output together with the labels that went in, or None.
    """

    def __init__(self, model: nn.Module, images_name: str) -> None:
        super().__init__()
        self._orig_mod = model
        self.images_name = images_name
        self.constants: dict[str, Any] = {}
        self.witness: Witness | None = None

    def forward(self, images: Tensor) -> Any:
        """Return the model's output for ``images``."""
        inputs = {self.images_name: images, **self.constants}
        if self.witness is None:
            return self._orig_mod(**inputs)
        inputs.update(self.witness.inputs(len(images)))
        try:
            output = self._orig_mod(**inputs)
        except IndexError:  # of a loss on labels that do not fit; the step finds the logits, and says so
            return self._orig_mod(**{self.images_name: images, **self.constants})
        self.witness.see(output, len(images))
        return output


class Witness:
    """Looks at the loss a model computes itself, and says whether it is cross-entropy and how it is averaged.

    Attributes:
        divides_by_items: The model divides the sum of its losses by ``num_items_in_batch``, rather than averaging.
        found: Loss and cross-entropy of the last batch, if they did not fit together.
        sure: The logits differed enough for the comparison to tell cross-entropy from its relatives.
    """

    def __init__(self, labels_name: str, *, pass_items: bool, exact: bool) -> None:
        self.labels_name, self.pass_items, self.exact = labels_name, pass_items, exact
        self.labels: Tensor | None = None
        self.divides_by_items = False
        self.found: tuple[float, float] | None = None
        self.seen = self.sure = False

    def inputs(self, number: int) -> dict[str, Any]:
        """Return what the model needs to compute a loss on ``number`` images."""
        assert self.labels is not None
        labels = self.labels[:number]  # which images these are does not matter here
        items = {"num_items_in_batch": labels.new_tensor(_PRETENDED * number)} if self.pass_items else {}
        return {self.labels_name: labels, **items}

    def see(self, output: Any, number: int) -> None:
        """Compare the model's loss with cross-entropy."""
        loss, logits = (output.get(name) if isinstance(output, dict) else None for name in ("loss", "logits"))
        if loss is None or logits is None or self.labels is None or logits.ndim != 2:
            return
        logits = logits.detach().float()
        expected = F.cross_entropy(logits, self.labels[:number]).item()
        value = loss.detach().float().item()
        tolerance = 1e-4 if self.exact and loss.dtype in (torch.float32, torch.float64) else 1e-2
        self.seen, self.found = True, (value, expected)
        for factor, divides in ((1.0, False), (1 / _PRETENDED, True)):
            if abs(value - factor * expected) <= tolerance * factor * expected + 1e-6 and (
                self.pass_items or not divides
            ):
                self.divides_by_items, self.found = divides, None
        self.sure = logits.std(dim=1).mean().item() > 0.1


class Logits(nn.Module):
    """Stands in for the model while the Trainer computes a loss: its output is ``logits``, whatever goes in.

    Attributes:
        calls: How often it was called.
        own_loss: The loss that the model would have computed itself, if it was given labels.
    """

    def __init__(self, model: nn.Module, logits: Tensor, labels_name: str, divides_by_items: bool) -> None:
        super().__init__()
        self.__dict__["stands_for"] = model
        self.logits, self.labels_name, self.divides_by_items = logits, labels_name, divides_by_items
        self.calls = 0
        self.own_loss: Tensor | None = None

    def forward(self, *args: Any, **inputs: Any) -> ImageClassifierOutput:
        """Return the logits, and the model's own kind of loss if there are labels."""
        self.calls += 1
        labels, items = inputs.get(self.labels_name), inputs.get("num_items_in_batch")
        if labels is not None:
            self.own_loss = F.cross_entropy(self.logits, labels)
            if self.divides_by_items and items is not None:
                self.own_loss = self.own_loss * (len(self.logits) / items)
        return ImageClassifierOutput(loss=self.own_loss, logits=self.logits)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"], name)

    def _get_name(self) -> str:
        return type(plain_model(self.__dict__["stands_for"])).__name__
