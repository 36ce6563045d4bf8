"""What attacks climb along: losses to raise, and their gradients with respect to pixels."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError, UnsupportedModelError
from entprop_wrap.robustness.evaluated_model import check_finite, check_labels_fit, logits
from entprop_wrap.robustness.pixels import to_images
from entprop_wrap.utils.modules import check_module, plain_model, walk
from entprop_wrap.utils.tensors import refuse_inference_mode

__all__ = ["AttackLoss", "check_attackable", "losses", "pixel_gradient"]

AttackLoss = Literal["cross_entropy", "margin"]


def check_attackable(model: nn.Module) -> None:
    """Check that an attack on ``model`` can be as strong as it should be.

    Raises:
        ConfigurationError: The model, or a part of it, is in training mode; or inference mode is on.
        UnsupportedModelError: It is not a module, or float16.
    """
    check_module("The model", model)
    refuse_inference_mode()
    if any(module.training for module in walk(plain_model(model))):
        raise ConfigurationError("The model, or a part of it, is in training mode. Write model.eval() first.")
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise UnsupportedModelError(
            "The model is float16, in which small gradients vanish and an attack looks weaker than it is. Write "
            "model.float(), with torch.autocast for speed."
        )


def losses(found: Tensor, labels: Tensor, loss: AttackLoss) -> Tensor:
    """Return the loss of each image, ``(N,)``: what an attack raises.

    Args:
        found: Logits ``(N, C)``.
        labels: ``(N,)`` int64.
        loss: "cross_entropy", or "margin": the largest other logit minus that of the label.
    """
    found = found.to(_widest(found))
    if loss == "cross_entropy":
        return cross_entropy(found, labels, reduction="none")
    own = one_hot(labels, found.shape[1]).bool()
    return found.masked_fill(own, -math.inf).amax(1) - found.gather(1, labels[:, None]).squeeze(1)


def pixel_gradient(model: nn.Module, pixels: Tensor, labels: Tensor, space: PixelSpace, loss: AttackLoss) -> Tensor:
    """Return the gradient of each image's loss with respect to its pixels, up to a positive factor per image.

    No parameter gets any gradient. The factor is free, since attacks use signs and directions only, and it is needed:
    the gradient of a confident prediction is exactly 0 in float32, and the attack would stand still. So the slope at
    the logits is taken in float64, and scaled to 1 before it goes back through the model.

    Args:
        model: In evaluation mode.
        pixels: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` int64.
        space: What the model takes.
        loss: As in :func:`losses`.

    Raises:
        LabelError: Labels do not fit the model.
        ModelOutputError: Logits are NaN or infinite, where nothing would move.
        UnsupportedModelError: The logits cannot be differentiated.
    """
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        found = logits(model, to_images(pixels, space))
        check_labels_fit(labels, found.shape[1], "The model")
        check_finite(found, "The model under attack")
        if not found.requires_grad:
            raise UnsupportedModelError(
                "The logits do not depend on the images in a way that can be differentiated: the model runs under "
                "torch.no_grad() inside. Attack it by Transfer(source=...) from another model."
            )
        values = found.detach().to(_widest(found)).requires_grad_()
        (slope,) = torch.autograd.grad(losses(values, labels, loss).sum(), values)
        slope = slope / slope.abs().amax(1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        (gradient,) = torch.autograd.grad(found, pixels, slope.to(found.dtype))
    return gradient


def _widest(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64  # MPS has no other
