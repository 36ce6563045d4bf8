"""The gradient of a loss with respect to some images of a pass, at the price of those images alone.

Asking autograd for the gradient of the images costs a backward through the first layer for the whole batch (8 to 11 %
of a step on small nets), of which a method uses the selected rows. Where the images go straight into a convolution, the
gradient of its output is there anyway, and one backward through that layer, for those rows, gives theirs. A model's
first step, with images of a size, looks whether nothing else uses them, and compares both gradients. Where that is not
so, or that layer is frozen, autograd's is taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.errors import ModelOutputError, UnsupportedModelError
from entprop_wrap.utils.graphs import uses_of
from entprop_wrap.utils.modules import plain_model, walk
from entprop_wrap.utils.tensors import index_rows

#: The convolution that each model begins with, by what images are like: some models pad those of other sizes, or change
#: their layout. None where autograd is to take the gradient.
_stems: weakref.WeakKeyDictionary[nn.Module, dict[Any, weakref.ref[nn.Conv2d] | None]] = weakref.WeakKeyDictionary()


class ImageGradient:
    """Watches one pass for the gradient of its images; :meth:`rows` gives it after the backward.

    Args:
        model: In any container.
        images: ``(N, C, H, W)``, a leaf. It will require a gradient where autograd is to take it.
        by_autograd: Let autograd take it, as where weights are to get no gradient and no backward would run.
    """

    def __init__(self, model: nn.Module, images: Tensor, *, by_autograd: bool = False) -> None:
        self.root, self.images = plain_model(model), images
        self.kind = images.shape[1:], images.dtype, images.is_contiguous(memory_format=torch.channels_last)
        known = _stems.setdefault(self.root, {})
        found = None if by_autograd else known.get(self.kind)
        stem = None if found is None else found()
        self.stem = stem if stem is not None and _trains(stem) else None
        self.candidates: list[nn.Conv2d] = []
        if self.stem is not None:
            self.candidates = [self.stem]
        elif not by_autograd and self.kind not in known:
            self.candidates = _convolutions(model, self.root)
        images.requires_grad_(self.stem is None)
        self.uses = 0  # operations that the images go straight into
        self.calls: list[nn.Conv2d] = []
        self.output_gradients: list[Tensor] = []

    @contextmanager
    def watch(self, batch: Tensor) -> Iterator[None]:
        """Watch the forward and the backward of the with-block, in which the model is given ``batch``."""

        def note(module: nn.Conv2d, args: tuple[Tensor, ...], output: Tensor) -> None:
            if args and args[0].shape == batch.shape and args[0].data_ptr() == batch.data_ptr():
                self.calls.append(module)
                if output.requires_grad:
                    output.register_hook(self.output_gradients.append)  # type: ignore[no-untyped-call]

        def count(module: nn.Module, args: Any, output: Any) -> None:
            self.uses = uses_of(batch, output)

        handles = [candidate.register_forward_hook(note) for candidate in self.candidates]
        if self.candidates and self.stem is None:
            handles.append(self.root.register_forward_hook(count))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rows(self, selected: Tensor) -> Tensor:
        """Return the gradients ``(m, C, H, W)`` of the images ``selected`` ``(m,)``, after the backward; once."""
        if self.stem is None:
            whole = input_gradient(self.images)
            if self.candidates:
                agrees = self._agrees(whole)
                _stems[self.root][self.kind] = weakref.ref(self.calls[0]) if agrees else None
                # The first step takes the way of those after it: a resumed run has another first step.
                if agrees and _trains(self.calls[0]):
                    return self._through(self.calls[0], selected)
            return index_rows(whole, selected)
        if not self._watched():
            del _stems[self.root]
            raise UnsupportedModelError(
                "The images no longer go straight into the layer that they went into in this model's first step. "
                "Expected a model that stays as it is; found one that was changed. The next step finds out anew."
            )
        found = self._through(self.stem, selected)
        self.output_gradients.clear()  # as large as the output of the layer, through all attack steps otherwise
        return found

    def _agrees(self, whole: Tensor) -> bool:
        if not self._watched() or self.uses != 1:
            return False
        found = self._through(self.calls[0], torch.arange(len(whole), device=whole.device))
        half = self.output_gradients[0].dtype in (torch.float16, torch.bfloat16)  # autograd then rounds coarsely
        tolerance = 0.05 if half else 0.01  # a wrong one differs by all of it
        return float((found - whole).abs().max()) <= tolerance * float(whole.abs().max())

    def _watched(self) -> bool:
        return len(self.calls) == len(self.output_gradients) == 1

    def _through(self, stem: nn.Conv2d, selected: Tensor) -> Tensor:
        images = index_rows(self.images.detach(), selected).requires_grad_()
        with torch.enable_grad():
            output = type(stem).forward(stem, images)
        (gradient,) = torch.autograd.grad(
            output, images, index_rows(self.output_gradients[0], selected).to(output.dtype)
        )
        return gradient


def watching(gradient: ImageGradient | None, batch: Tensor) -> AbstractContextManager[None]:
    """Return ``gradient.watch(batch)``, or a context that does nothing where no gradient is wanted."""
    return nullcontext() if gradient is None else gradient.watch(batch)


def _trains(stem: nn.Conv2d) -> bool:
    """Return whether the output of a layer has a gradient even where its input needs none."""
    return any(parameter.requires_grad for parameter in stem.parameters())


def _convolutions(model: nn.Module, root: nn.Module) -> list[nn.Conv2d]:
    """Return the layers that may be a model's first; none where hooks would be in the way."""
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in walk(model)):
        return []
    convolutions = [module for module in walk(root) if isinstance(module, nn.Conv2d)]
    # FSDP2 shards weights outside of the model's own passes, and a parametrisation may compute anew in each.
    return [conv for conv in convolutions if type(conv._parameters.get("weight")) is nn.Parameter]


def gradient_of(value: Tensor, images: Tensor, *weights: Tensor, retain_graph: bool = False) -> Tensor:
    """Return the gradient of ``value``, by ``weights`` unless it is a scalar, with respect to ``images`` alone."""
    try:
        (gradient,) = torch.autograd.grad(value, images, weights or None, retain_graph, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
        raise UnsupportedModelError(
            "The gradient of the images alone is needed, which reentrant activation checkpointing cannot give. Write "
            "use_reentrant=False (gradient_checkpointing_kwargs in Hugging Face models), or switch checkpointing off; "
            "EntProp with attack_steps=1 trains with it."
        ) from error
    return _reached(gradient)


def input_gradient(images: Tensor) -> Tensor:
    """Return the gradient that a backward left on ``images``."""
    return _reached(images.grad)


def _reached(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise ModelOutputError(
            "No gradient reached the images: the model detaches its input, or the given backward() did not run. "
            "Expected logits that are differentiable with respect to the images."
        )
    return gradient
