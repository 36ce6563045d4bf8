"""The result of one training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entprop_wrap.data import validation
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.uncertainty import entropy


@dataclass(frozen=True)
class StepOutput:
    """Result of one training step. Tensors are detached and stay on the device; reading them is up to you.

    Attributes:
        loss: Scalar: what was minimised, such as ``main_loss + weight * aux_loss``.
        main_loss: Scalar: mean loss of the main pass.
        logits: ``(N, C)``: logits of the main pass, in training mode; of the mixed images where the method mixes them.
        entropy: ``(N,)``: entropy of their softmax, in nats.
        passes: Cost of the step, in forward and backward passes of the whole batch; vanilla training is 1.
        aux_loss: Scalar: mean loss of the auxiliary pass, before weighting; None where there is none.
        aux_logits: ``(m, C)``: logits of the auxiliary pass, or None.
        aux_images: ``(m, C, H, W)``: the images that went through the auxiliary norms, or None.
        selected: ``(m,)`` int64: their rows in the batch, most uncertain first, or None.
    """

    loss: Tensor
    main_loss: Tensor
    logits: Tensor
    entropy: Tensor
    passes: float
    aux_loss: Tensor | None = None
    aux_logits: Tensor | None = None
    aux_images: Tensor | None = None
    selected: Tensor | None = None
    checker: validation.Checker | None = None

    @property
    def aux_entropy(self) -> Tensor | None:
        """``(m,)``: entropy of the softmax of ``aux_logits``, in nats, or None."""
        return None if self.aux_logits is None else entropy(self.aux_logits)

    def scalars(self) -> dict[str, Tensor]:
        """Return losses and mean entropies as scalars on the device, by the names that logs use."""
        values = {"loss": self.loss, "main_loss": self.main_loss, "main_entropy": self.entropy.mean()}
        if self.aux_loss is not None and (entropies := self.aux_entropy) is not None:
            values |= {"aux_loss": self.aux_loss, "aux_entropy": entropies.mean()}
        return values

    def metrics(self) -> dict[str, float]:
        """Return :meth:`scalars` as numbers; waits for the device.

        Raises:
            LabelError: A batch since the last call held labels out of range (accelerators only).
            PixelRangeError: A batch since the last call held images outside the pixel space (accelerators only).
            DivergedError: An optimizer stepped on a loss that was not finite (accelerators only).
        """
        if self.checker is not None:
            self.checker.raise_pending()
        values = self.scalars()
        # One copy from the device; not as float64 where there was none, which MPS lacks.
        wide = torch.float64 if any(value.dtype == torch.float64 for value in values.values()) else torch.float32
        return dict(zip(values, torch.stack([v.to(wide) for v in values.values()]).tolist(), strict=True))

    def __repr__(self) -> str:
        losses = {"loss": self.loss, "main_loss": self.main_loss, "aux_loss": self.aux_loss}
        parts = [f"{name}={float(value):.4g}" for name, value in losses.items() if value is not None]
        parts.append(f"{len(self.logits)} images")
        if self.aux_logits is not None:
            parts.append(f"{len(self.aux_logits)} auxiliary images")
        return f"StepOutput({', '.join(parts)}, passes={self.passes:.4g})"


class FinishedLoss(Tensor):
    """A loss whose backward has run: a plain tensor in all else."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    def backward(self, *args: Any, **options: Any) -> None:
        """Raise :class:`ConfigurationError`: the step has done it."""
        raise ConfigurationError("training_step() has run the backward of this loss: leave out loss.backward().")

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def finished(loss: Tensor) -> Tensor:
    """Return ``loss`` detached; its ``backward`` raises."""
    return loss.detach().as_subclass(FinishedLoss)
