"""Entropic retraining: our own variant, since its source is not public."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from entprop_wrap.errors import ConfigurationError, ModelOutputError, UnsupportedModelError
from entprop_wrap.functional.losses import mean_entropy
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.utils.modules import plain_model, walk
from entprop_wrap.utils.options import check_number, shown
from entprop_wrap.wrapping.norm_layers import is_norm

__all__ = ["EntropicRetraining", "activation_entropy"]


@dataclass(frozen=True)
class EntropicRetraining(Method):
    """Train on with a *trained* model, on its own data, and steer the entropy of its activations and its outputs.

    **Experimental; inspired by** Sperl and Boettinger, "Optimizing Information Loss Towards Robust Neural Networks"
    (arXiv 2008.03072), and no implementation of it. Of that paper only the abstract was open to us: a network that is
    trained already is retrained on the original data alone, without adversarial examples, such that it takes on what
    an information-theoretic analysis finds adversarial training does to networks. Its loss, its layers, its estimator
    of entropy, the signs, coefficients and schedule are unknown to us, and all of those below are ours. None of the
    paper's claims or figures are claimed for this; whether it helps your model is for you to measure. Terms on entropy
    can hide gradients from an attack: evaluate with transferred attacks too.

    What is minimised, through the model's own norms, in training mode:

        loss(f(x), y) - output_weight * H(softmax f(x)) - activation_weight * mean over layers of A(layer)

    H is the mean entropy of the outputs in nats. A is the mean over images of :func:`activation_entropy`: how evenly an
    image's energy is spread over the channels of a layer's output, between 0 (one channel) and 1 (all alike). A
    positive weight raises an entropy, a negative one lowers it. The defaults raise both: networks trained adversarially
    are known to be less confident than others, and a decision that many channels carry should be harder to overturn by
    a few of them. That is a motive, not a result.

    Use it for the last epochs, at a small learning rate, from trained weights; nothing checks that they are.

    Cost: 1 pass. Not on compiled models, whose layers cannot be looked into; checkpointing only with
    ``use_reentrant=False``.

    Attributes:
        activation_weight: Coefficient of the activation entropy, of either sign.
        output_weight: Coefficient of the output entropy per nat, of either sign.
        layers: Glob over the names of norm layers in ``named_modules()``; those that match count, each alike.

    Raises:
        ConfigurationError: Weights are not finite, or both are 0: that is ``Vanilla``.
    """

    activation_weight: float = 0.1
    output_weight: float = 0.1
    layers: str = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("activation_weight", "output_weight"):
            check_number(name, getattr(self, name), lambda value: True, "of either sign")
        if not self.activation_weight and not self.output_weight:
            raise ConfigurationError("activation_weight and output_weight are both 0: write Vanilla() for that.")
        if not isinstance(self.layers, str) or not self.layers:
            raise ConfigurationError(
                f"layers must be a glob over names such as 'layer4.*', found {shown(self.layers)}."
            )

    def step(self, step: Step) -> StepOutput:
        """Run the step.

        Raises:
            ConfigurationError: No norm layer of that name ran, or none that depends on trainable parameters.
            UnsupportedModelError: The model is compiled, or uses reentrant checkpointing.
        """
        with self._recorded(step.model) as recorded:
            logits = step.forward(step.images)
        main_loss = step.loss(logits, step.labels)
        loss = main_loss
        if self.output_weight:
            loss = loss - self.output_weight * mean_entropy(logits)
        if self.activation_weight:
            if not recorded:
                raise ConfigurationError(
                    f"No norm layer like {self.layers!r} ran with anything trainable before or in it: there is no "
                    "activation entropy to steer. Choose other layers, or activation_weight=0."
                )
            evenness = [activation_entropy(output, channels=channels).mean() for output, channels in recorded]
            loss = loss - self.activation_weight * torch.stack(evenness).mean()
        step.backward(loss)
        return step.output(loss=loss, main_loss=main_loss, logits=logits, passes=1.0)

    @contextmanager
    def _recorded(self, model: nn.Module) -> Iterator[list[tuple[Tensor, int]]]:
        """Collect output and channel dimension of each chosen layer that runs inside the with-block."""
        recorded: list[tuple[Tensor, int]] = []
        if not self.activation_weight:
            yield recorded
            return
        if any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in walk(model)):
            raise UnsupportedModelError(
                "EntropicRetraining looks into the layers of the model, which compiled code does not show. Train "
                "without torch.compile (TrainerConfig(compile=False)), or with activation_weight=0."
            )
        norms = {name: module for name, module in plain_model(model).named_modules() if is_norm(module)}
        chosen = fnmatch.filter(norms, self.layers)
        if not chosen:
            raise ConfigurationError(
                f"layers={self.layers!r} matches none of the {len(norms)} norm layers of the model"
                + (f", such as {next(iter(norms))!r}." if norms else ".")
            )

        def record(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.is_grad_enabled():
                raise UnsupportedModelError(
                    "A norm layer ran without gradients inside the training pass, as in reentrant activation "
                    "checkpointing, which hides activations from the loss. Write use_reentrant=False."
                )
            if not isinstance(output, Tensor):
                raise ModelOutputError(f"Expected {type(module).__name__} to return a tensor. Choose other layers.")
            if output.requires_grad:
                # A clone, because an activation may work in place; nothing more, because checkpointing runs the layer
                # again without this hook, and has to find as many tensors saved.
                recorded.append((output.clone(), channel_dimension(module, output)))

        handles = [norms[name].register_forward_hook(record) for name in chosen]
        try:
            yield recorded
        finally:
            for handle in handles:
                handle.remove()


def activation_entropy(activations: Tensor, *, channels: int = 1) -> Tensor:
    """Return how evenly each image's energy is spread over channels: ``(N, ...) -> (N,)``, in [0, 1].

    Energy is the mean square over positions. A channel's share is its energy over that of all channels, which is the
    softmax of log energies; the result is the Shannon entropy of the shares over the logarithm of their number. It
    does not depend on the scale of the activations.

    Args:
        activations: ``(N, C)``, ``(N, C, H, W)``, ``(N, tokens, C)``, ...; C at least 2.
        channels: The dimension of channels.

    Raises:
        ModelOutputError: There are no two channels.
    """
    values = activations if activations.dtype == torch.float64 else activations.float()
    if values.ndim < 2 or values.shape[channels] < 2:
        raise ModelOutputError(
            f"Expected activations with at least 2 channels, found shape {tuple(activations.shape)}. Choose other "
            "layers."
        )
    energies = values.movedim(channels, 1).flatten(2).square().mean(dim=2) if values.ndim > 2 else values.square()
    # Without the small number, a channel that is off (after a fused ReLU) has no finite gradient.
    logarithms = (energies + 1e-12).log().log_softmax(dim=1)
    return -(logarithms.exp() * logarithms).sum(dim=1) / math.log(energies.shape[1])


def channel_dimension(module: nn.Module, output: Tensor) -> int:
    """Return which dimension of a norm's output is its channels: 1, or the last in layer norms over tokens."""
    last, shape = output.ndim - 1, output.shape
    if isinstance(module, (_NormBase, nn.GroupNorm)) or last == 1:
        return 1
    mean = module._buffers.get("running_mean")
    if mean is not None and shape[1] == mean.numel():
        return 1
    weight = next((parameter for parameter in module.parameters(recurse=False)), None)
    fits = [] if weight is None else [place for place in (1, last) if shape[place] == weight.numel()]
    if "2d" in type(module).__name__.lower() or getattr(module, "data_format", None) == "channels_first":
        fits = [place for place in fits if place == 1]  # over (N, C, H, W) in timm, torchvision, transformers
    elif last == 2 or type(module) in (nn.LayerNorm, nn.RMSNorm):
        fits = [place for place in fits if place == last]
    if len(fits) == 1:
        return fits[0]
    raise ModelOutputError(
        f"Cannot tell the channels in the output of {type(module).__name__}, of shape {tuple(shape)}. Choose other "
        "layers."
    )
