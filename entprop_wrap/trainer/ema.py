"""The exponential moving average of a model's weights and statistics."""

from __future__ import annotations

from accelerate.utils import broadcast
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """An average that begins with the weights after the first step.

    ``module`` is a copy of the model, wrapped if the model is. Running statistics are averaged too, so that they belong
    to the averaged weights. ``decay`` is the weight of the past in each update, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        mean = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(model, multi_avg_fn=mean, use_buffers=True)
        # Counters, such as num_batches_tracked, have no average, nor have masks of -inf.
        self.copied = [not (b.is_floating_point() and bool(b.isfinite().all())) for b in model.buffers()]
        self.requires_grad_(False).eval()

    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of ``model`` after a step into the average."""
        super().update_parameters(model)
        for mean, buffer, copied in zip(self.module.buffers(), model.buffers(), self.copied, strict=True):
            if copied:
                mean.copy_(buffer)

    def share_statistics(self) -> None:
        """Give every process the main process's running statistics, as DDP does in the model's forward passes."""
        for buffer in self.module.buffers():
            broadcast(buffer)
