"""The exponential moving average of a model's weights and statistics."""

from __future__ import annotations

from accelerate.utils import broadcast
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["make_average", "share_statistics", "update_average"]


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return an average that begins with the weights after the first step.

    ``average.module`` is a copy of the model, wrapped if the model is. Running statistics are averaged too, so that
    they belong to the averaged weights. ``decay`` is the weight of the past in each update, in (0, 1).
    """
    mean = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=mean, use_buffers=True)
    return average.requires_grad_(False).eval()


def update_average(average: AveragedModel, model: nn.Module) -> None:
    """Take the weights of ``model`` after a step into the average."""
    average.update_parameters(model)
    for mean, buffer in zip(average.module.buffers(), model.buffers(), strict=True):
        if not buffer.is_floating_point():
            mean.copy_(buffer)  # counters, such as num_batches_tracked, have no average


def share_statistics(average: AveragedModel) -> None:
    """Give every process the main process's running statistics, as DDP does in the model's forward passes."""
    for buffer in average.module.buffers():
        broadcast(buffer)
