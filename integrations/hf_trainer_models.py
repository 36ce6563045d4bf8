"""What stands around and in for a model in the Hugging Face Trainer's step."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from entprop_wrap.containers import plain_model
from entprop_wrap.integrations.hf_trainer_witness import Witness

__all__ = ["Logits", "ModelOnImages"]


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
        self.witness.see(output, plain_model(self._orig_mod), {self.images_name: images.detach(), **self.constants})
        return output


class Logits(nn.Module):
    """Stands in for the model while the Trainer computes a loss: its output is ``logits``, whatever goes in.

    Attributes:
        calls: How often it was called.
        own_loss: The loss that the model would have computed itself, if it was given labels.
    """

    def __init__(
        self, model: nn.Module, logits: Tensor, labels_name: str, scale: float, divides_by_items: bool
    ) -> None:
        super().__init__()
        self.__dict__["stands_for"] = model
        self.logits, self.labels_name = logits, labels_name
        self.scale, self.divides_by_items = scale, divides_by_items
        self.calls = 0
        self.own_loss: Tensor | None = None

    def forward(self, *args: Any, **inputs: Any) -> ImageClassifierOutput:
        """Return the logits, and the model's own kind of loss if there are labels."""
        self.calls += 1
        labels, items = inputs.get(self.labels_name), inputs.get("num_items_in_batch")
        if labels is not None:
            self.own_loss = F.cross_entropy(self.logits, labels) * self.scale
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
