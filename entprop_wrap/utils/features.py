"""The features of a classifier: what its head, the layer that makes the logits, is given."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from entprop_wrap.errors import ConfigurationError, ModelOutputError
from entprop_wrap.utils.model_output import logits_of, raw_logits
from entprop_wrap.utils.modules import check_module, plain_model, walk
from entprop_wrap.utils.options import shown

__all__ = ["Features", "features_of"]

#: How many of the layers that ran last are looked at: heads with adapters run half a dozen. Their tensors stay alive.
_LAST = 16


class _Call(NamedTuple):
    name: str
    module: nn.Module
    input: Any
    output: Any


class Features:
    """The input of the chosen layer in the latest pass of the model.

    Attributes:
        layer: Name of the layer in ``named_modules()`` of the plain model; None before the first pass.
    """

    layer: str | None = None
    _last: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """Features ``(N, D)`` of the latest pass, in its graph; maps and tokens are averaged over positions.

        Raises:
            ConfigurationError: The model has not been called inside the with-block.
        """
        if self._last is None:
            raise ConfigurationError("No pass was recorded. Call the model inside the with-block.")
        return self._last


@contextmanager
def features_of(model: nn.Module, *, layer: str | None = None) -> Iterator[Features]:
    """Record the input of the classifier's head in every pass of ``model`` inside the with-block.

        with features_of(model) as features:
            logits = model(images)
            features.last  # (N, D)

    The head is the innermost module with parameters whose output is the logits. Features are what it is given, after
    dropout if there is any, and differentiable where gradients are on. Compiled models run eagerly inside the block.

    Args:
        model: A classifier, wrapped or plain, in a DDP or compiled container or not.
        layer: Name of another layer, from ``named_modules()``, whose input to record.

    Raises:
        ConfigurationError: There is no layer of that name.
        ModelOutputError: In a pass: no layer makes the logits, the chosen layer did not run or ran several times, or
            its input is not a tensor with one row (or map) per image.
    """
    check_module("features_of()", model)
    root = plain_model(model)
    modules = dict(root.named_modules())
    if layer is not None and (not isinstance(layer, str) or not layer or layer not in modules):
        raise ConfigurationError(
            f"{type(root).__name__} has no layer {shown(layer)}. Write a name from model.named_modules()."
        )
    features, calls, running = Features(), deque[_Call](maxlen=_LAST), False

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal running
        calls.clear()
        features._last, running = None, True

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, name: str) -> None:
        if running:  # and not in a backward, where checkpointing runs layers again
            calls.append(_Call(name, module, _first_tensor(args, kwargs), output))

    def end(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal running
        found, running = list(calls), False
        calls.clear()
        given = _first_tensor(args, kwargs)
        if given is None:
            raise ModelOutputError("The model was called without a tensor: expected model(images).")
        if layer is not None and len(found) != 1:
            raise ModelOutputError(f"Expected {layer!r} to run once in a pass, found {len(found)} times.")
        call = found[0] if layer is not None else _head(found, output, len(given))
        features.layer, features._last = call.name, _pooled(call, len(given))

    handles = [root.register_forward_pre_hook(begin)]
    for name, module in modules.items():
        # A layer without parameters (an activation, a pool) makes no logits, it passes them on.
        wanted = name == layer if layer is not None else module is not root and any(True for _ in module.parameters())
        if wanted:
            handles.append(module.register_forward_hook(partial(note, name=name), with_kwargs=True, prepend=True))
    # Before other hooks of the root, which may replace the logits by another tensor.
    handles.append(root.register_forward_hook(end, with_kwargs=True, prepend=True))
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in walk(model))
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield features
    finally:
        for handle in handles:
            handle.remove()
        calls.clear()


def _head(calls: list[_Call], output: Any, batch: int) -> _Call:
    """Return the first call whose output is, or shares memory with, the logits."""
    classes = logits_of(output, batch, differentiable=False, least=1).shape[1]
    found = [call for call in calls if _same(call.output, raw_logits(output))]
    if not found:
        # The model has changed the logits: a cast, a mean over positions. Take the last layer with as many outputs.
        like = [call for call in calls if _channels(call) == classes]
        found = [call for call in like if _same(call.output, like[-1].output)]
    if not found:
        last = f"; the last layers to run: {', '.join(repr(call.name) for call in calls[-3:])}" if calls else ""
        raise ModelOutputError(
            f"No layer of the model makes its {classes} logits{last}. Say which layer's input to take: layer='name', "
            "from model.named_modules()."
        )
    return found[0]


def _pooled(call: _Call, batch: int) -> Tensor:
    value = call.input
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] != batch or not value.is_floating_point():
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"
        raise ModelOutputError(
            f"Expected the layer {call.name!r} to be given one row or map for each of {batch} images; found {found}. "
            "Choose another: layer='name'."
        )
    if value.ndim == 2:
        return value
    last = _channels_last(call.module, value)
    return value.mean(tuple(range(1, value.ndim - 1)) if last else tuple(range(2, value.ndim)))


def _channels_last(module: nn.Module, value: Tensor) -> bool:
    if isinstance(module, (_ConvNd, _NormBase, nn.GroupNorm)):
        return False
    if type(module) in (nn.Linear, nn.LayerNorm) or value.ndim == 3:  # (N, tokens, D)
        return True
    size = getattr(module, "in_features", None) or (getattr(module, "normalized_shape", None) or (None,))[0]
    return size == value.shape[-1] and size != value.shape[1]


def _channels(call: _Call) -> int | None:
    """Return the number of outputs of a layer, None where it gives no tensor."""
    if not isinstance(call.output, Tensor) or call.output.ndim < 2:
        return None
    return call.output.shape[-1 if call.output.ndim == 3 or isinstance(call.module, nn.Linear) else 1]


def _same(output: Any, logits: Tensor) -> bool:
    if output is logits or not isinstance(output, Tensor):
        return output is logits
    return output.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
