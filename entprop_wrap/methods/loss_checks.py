"""What shows in the first call of a loss: whether it is a mean, and whether it trains all that the model returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from entprop_wrap.errors import ConfigurationError, ModelOutputError
from entprop_wrap.functional.losses import Loss, cross_entropy
from entprop_wrap.utils.graphs import leaves_of
from entprop_wrap.utils.model_output import raw_logits


def is_mean(loss: Loss, logits: Tensor, labels: Tensor, value: Tensor, more: Mapping[str, Any] | None = None) -> bool:
    """Return whether ``loss`` averages over rows, rather than adds them up; True where that cannot be told.

    It is called once, on every row twice: a sum doubles, a mean stays. Gradients, buffers of a loss that is a module,
    and torch's random states are as before.
    """
    if loss is cross_entropy or getattr(loss, "entprop_mean", False):
        return True
    rows = logits.detach().repeat(2, 1), torch.cat([labels, labels])

    def repeated(leaf: Any) -> Any:
        if isinstance(leaf, dict):  # of a class of its own, which torch takes for a leaf
            again = copy.copy(leaf)
            again.update(tree_map(repeated, dict(leaf)))
            return again
        of_rows = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(logits)
        return torch.cat([leaf.detach()] * 2) if of_rows else leaf

    more = {name: tree_map(repeated, value) for name, value in (more or {}).items()}
    again: Callable[[], Tensor] = partial(loss, *rows, **more)
    if isinstance(loss, nn.Module):  # on clones, as the backward needs the buffers untouched
        buffers = {name: buffer.clone() for name, buffer in loss.named_buffers()}
        again = partial(functional_call, loss, buffers, rows, more)
    devices = [logits.device] if logits.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            doubled = again()
        once, twice = float(value.detach()), float(doubled)
    except Exception:
        return True  # a loss for this number of rows only: a method that needs others fails by itself
    return not (once != 0 and abs(twice - 2 * once) < 1e-3 * abs(once))


def check_scalar(loss: object) -> None:
    """Raise :class:`ConfigurationError` unless ``loss`` is what a loss returns: a tensor without dimensions."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigurationError(
            f"loss must return a scalar tensor, the mean over the batch; found {found}. Leave out reduction='none'."
        )


def refuse_idle_heads(output: Any) -> None:
    """Raise :class:`ModelOutputError` if a model returns more than logits, with parameters that these do not train.

    GoogLeNet's auxiliary classifiers, the distillation head of DeiT, the projection of a contrastive loss.
    """
    logits: Tensor = raw_logits(output)
    others = [(name, t) for name, t in _tensors(output) if t.requires_grad and t is not logits]
    if not others:
        return
    trained = leaves_of(logits)
    # Outputs of a compiled model come from one node, so that all seem to be trained: there the shape tells.
    idle = [
        f"{name} {tuple(tensor.shape)}"
        for name, tensor in others
        if not leaves_of(tensor) <= trained or (tensor.grad_fn is logits.grad_fn and tensor.shape == logits.shape)
    ]
    if idle:
        raise ModelOutputError(
            f"The model returns heads that a loss of the logits does not train: {', '.join(idle)}. Switch the heads "
            "off (aux_logits=False), or write a loss of all that the model returns, in a loop of your own: "
            "training_step(..., loss=lambda logits, labels, outputs: ...)."
        )


def _tensors(output: Any, name: str = "outputs") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from _tensors(value, f"{name}[{key!r}]")
    elif isinstance(output, (list, tuple)):
        fields = getattr(output, "_fields", None)
        for place, value in enumerate(output):
            yield from _tensors(value, f"{name}.{fields[place]}" if fields else f"{name}[{place}]")
