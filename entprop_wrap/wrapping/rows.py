"""One pass for two domains: the first rows of a batch run in the main domain, the rest in an auxiliary one.

Norm layers split their input along dimension 0, so that is right only where the rows of an image lie together there, in
the order of the batch. Nothing in a model says so; :func:`prove_rows` tries it out.

Source: the joint batch of split batch norms (Xie et al., CVPR 2020; timm's ``SplitBatchNorm2d``), for any norm.
"""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.utils.model_output import raw_logits
from entprop_wrap.utils.modules import evaluating, plain_model, walk
from entprop_wrap.wrapping.active_domain import Key, Rows
from entprop_wrap.wrapping.registry import Registry, find_registry

#: Registries whose model has been tried out, with the auxiliaries it was tried with.
_proven: weakref.WeakKeyDictionary[Registry, set[str]] = weakref.WeakKeyDictionary()

#: How far the joint pass may be from two separate ones, relative to the largest logit: kernels differ by batch size.
_TOLERANCE = 1e-3


@contextmanager
def rows_split(model: nn.Module, auxiliary: str, main: int, total: int) -> Iterator[None]:
    """Run the first ``main`` of the ``total`` images of each pass through the main norms, the rest through others."""
    with find_registry(model).switch.block(Rows(auxiliary, main, total)):
        yield


def prove_rows(model: nn.Module, images: Tensor, auxiliary: str) -> None:
    """Raise unless one pass over split rows equals two separate passes; tried once per model, then remembered.

    What every call of a norm returns is compared, and the logits. Copies are moved away from the norms for the trial,
    so that a wrong domain shows, and put back. The passes run in evaluation mode, so that nothing is drawn and no
    statistic moves. Up to 5 of the images are used.
    """
    registry = find_registry(model)
    if auxiliary in _proven.setdefault(registry, set()):
        return
    root = plain_model(model)
    images = images[:5].detach()  # an odd number, split unevenly, so that no symmetry hides a permutation
    main = max(1, len(images) // 2)
    parts: list[dict[tuple[str, int], Tensor]] = [{}, {}]
    joint: dict[tuple[str, int], Tensor] = {}
    with _trial(root, registry, auxiliary):
        _record(root, registry, None, images[:main], parts[0])
        _record(root, registry, auxiliary, images[main:], parts[1])
        with suppress(UnsupportedModelError):  # of a norm whose rows are no multiple: it is named below
            _record(root, registry, Rows(auxiliary, main, len(images)), images, joint)
    # Older torch keeps the weights cast without gradients for the next pass, which would train nothing.
    torch.clear_autocast_cache()
    for call in parts[0]:
        if call not in joint or not _equal(joint[call], [part[call] for part in parts if call in part]):
            layer = f"the norm layer {call[0]!r}" if call[0] else "the logits"
            raise UnsupportedModelError(
                "lagged=True runs two domains in one pass: the rows of an image must lie together along dimension 0, "
                "and no shared norm layer may take statistics of the whole batch. "
                f"In {type(root).__name__} that fails at {layer} or before. Write lagged=False, or where norm layers "
                "are shared, wrap(model) without exclude= and copies=."
            )
    _proven[registry].add(auxiliary)


def _record(
    root: nn.Module, registry: Registry, key: Key, images: Tensor, found: dict[tuple[str, int], Tensor]
) -> None:
    """Put what each norm gives into ``found``, by its name and the number of the call, and the logits under ""."""
    handles, calls = [], Counter[str]()
    for name, norm in registry.norms.items():

        def note(module: nn.Module, args: object, output: Tensor, name: str = name) -> None:
            calls[name] += 1
            found[name, calls[name]] = output.detach()

        handles.append(norm.register_forward_hook(note))
    try:
        with registry.switch.block(key):
            found["", 1] = raw_logits(root(images)).detach()
    finally:
        for handle in handles:
            handle.remove()


def _equal(joint: Tensor, parts: list[Tensor]) -> bool:
    if any(part.ndim != joint.ndim or part.shape[1:] != joint.shape[1:] for part in parts):
        return False
    separate = torch.cat(parts)
    if separate.shape != joint.shape or not bool(separate.isfinite().all()):
        return False
    return float((joint - separate).abs().max()) <= _TOLERANCE * max(float(separate.abs().max()), 1e-12)


@contextmanager
def _trial(root: nn.Module, registry: Registry, auxiliary: str) -> Iterator[None]:
    """Make the copies differ from the norms, and the model deterministic, inside the with-block."""
    copies = registry.copies(auxiliary)
    parameters: list[Tensor] = [p for copy in copies for p in copy.parameters(recurse=False)]
    buffers = [b for copy in copies for b in copy.buffers(recurse=False) if b.is_floating_point()]
    before = [tensor.detach().clone() for tensor in (*parameters, *buffers)]
    dice = random.Random(0)
    try:
        with evaluating(root), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for tensor in parameters:  # by numbers, which sharded tensors take too; also where a weight starts at 0
                tensor.mul_(dice.uniform(0.5, 0.8)).add_(dice.uniform(0.1, 0.3))
            for tensor in buffers:  # variances stay positive
                tensor.mul_(dice.uniform(1.5, 2.5))
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip((*parameters, *buffers), before, strict=True):
                tensor.copy_(value)
        for module in walk(root):
            if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
                # Else what the last pass gathered, moved copies, would serve the next.
                module.reshard()  # type: ignore[operator]
