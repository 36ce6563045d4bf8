"""The images that wait between two lagged steps: hardened in one, trained in the next.

They belong to a model and to one process, as the batches of processes do. A trainer that resumes bit for bit saves
:func:`lagged_state` beside the model, and gives it to :func:`load_lagged_state`.

Source: training on adversarial images of earlier weights is ConAdv's (arXiv 2106.00221); that the gradient of one step
may serve the next is also what AsyncSAM (arXiv 2503.11147) finds.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import CheckpointError, UnsupportedModelError
from entprop_wrap.functional.targets import Target
from entprop_wrap.utils.modules import plain_model, walk
from entprop_wrap.wrapping.registry import ATTRIBUTE


@dataclass(frozen=True)
class Waiting:
    """Hardened images ``(m, C, H, W)``, detached, and their labels.

    ``space`` is that of the step that made them, and ``owner`` what the copies of the model were held by then; None
    where they come from a file.
    """

    images: Tensor
    target: Target
    space: PixelSpace | None = None
    owner: weakref.ref[Any] | None = None

    def fits(self, images: Tensor, labels: Tensor) -> bool:
        """Return whether these images can be trained in one batch with ``images`` and ``labels``."""
        mine, theirs = (self.images, self.target.labels), (images, labels)
        return all(
            a.shape[1:] == b.shape[1:] and a.dtype == b.dtype and a.device == b.device
            for a, b in zip(mine, theirs, strict=True)
        )


_waiting: weakref.WeakKeyDictionary[nn.Module, Waiting] = weakref.WeakKeyDictionary()


def waiting_for(model: nn.Module, images: Tensor, labels: Tensor, space: PixelSpace) -> Waiting | None:
    """Return what waits for ``model``; None where nothing does, or nothing that fits the batch.

    Images of another size, as progressive resizing brings them, cannot be trained together: those that wait are lost.
    So are those of another pixel space, and of a model that was unwrapped and wrapped anew: of another training. Where
    processes communicate in every pass through a copy, and others may still have theirs, losing them raises.
    """
    root = _root(model)
    waiting = _waiting.get(root)
    if waiting is None:
        return None
    another = waiting.owner is not None and waiting.owner() is not root.__dict__.get(ATTRIBUTE)
    if another or waiting.space not in (None, space):
        return None
    if waiting.fits(images, labels):
        return waiting
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _refuse_to_lose(root, waiting.images, images)
    return None


def _refuse_to_lose(root: nn.Module, waiting: Tensor, images: Tensor) -> None:
    """Raise if processes that run other domains than this one would wait for it. DDP alone waits for all gradients."""
    synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in walk(root))
    if synchronised or any(type(parameter).__name__ == "DTensor" for parameter in root.parameters()):
        raise UnsupportedModelError(
            f"Images of {tuple(waiting.shape[1:])} wait for this lagged step, and the batch has "
            f"{tuple(images.shape[1:])}: they cannot be trained together. With FSDP2 or SyncBatchNorm every process "
            "has to drop them in the same step. Where all change the size, write load_lagged_state(model, {})."
        )


def _root(model: nn.Module) -> nn.Module:
    """Return the model that was wrapped, also of one compiled by region, which is another with the same parts."""
    root = plain_model(model)
    original: nn.Module = root.__dict__.get("_orig_mod", root)
    return original


def put(model: nn.Module, images: Tensor, target: Target, space: PixelSpace) -> None:
    """Let hardened images wait for the next step of ``model``, instead of what waited before."""
    target = Target(target.labels, target.partners, target.share)  # the next step does not have the places in this one
    root = _root(model)
    registry = root.__dict__.get(ATTRIBUTE)
    _waiting[root] = Waiting(images, target, space, None if registry is None else weakref.ref(registry))


def lagged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what waits for the next step of ``model``, as tensors to save; empty where nothing does."""
    waiting = _waiting.get(_root(model))
    if waiting is None:
        return {}
    target = waiting.target
    state = {
        "images": waiting.images,
        "labels": target.labels,
        "share": torch.tensor(target.share, dtype=torch.float64, device="cpu"),
    }
    return state if target.partners is None else {**state, "partners": target.partners}


def load_lagged_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let what :func:`lagged_state` returned wait for the next step of ``model``, on the model's device.

    Raises:
        CheckpointError: ``state`` is not what :func:`lagged_state` returned.
    """
    root = _root(model)
    _waiting.pop(root, None)
    if not state:
        return
    if not {"images", "labels", "share"} <= set(state) <= {"images", "labels", "share", "partners"}:
        raise CheckpointError(
            f"Expected the images, labels and share that lagged_state() returned, found {sorted(state)}. Load the file "
            "that was saved with the model."
        )
    device = next((tensor.device for tensor in root.parameters()), state["images"].device)
    partners = state["partners"].to(device) if "partners" in state else None
    target = Target(state["labels"].to(device), partners, float(state["share"]))
    _waiting[root] = Waiting(state["images"].to(device), target)
