"""The stages of a method, seen from outside: its own step runs on a copy of the model, and is watched."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from entprop_wrap.data.batches import images_and_labels
from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import check_evaluated
from entprop_wrap.errors import ConfigurationError, DataError
from entprop_wrap.functional.losses import cross_entropy
from entprop_wrap.methods import EntProp
from entprop_wrap.methods.base import Method, check_method
from entprop_wrap.methods.input_gradient import ImageGradient
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.robustness.distributed import check_batches
from entprop_wrap.robustness.evaluated_model import check_finite, check_state, device_of, logits_in
from entprop_wrap.utils.modules import plain_model
from entprop_wrap.utils.options import check_flag
from entprop_wrap.utils.snapshot import Snapshot
from entprop_wrap.wrapping.model import ensure_wrapped


@dataclass(frozen=True)
class Stages:
    """The images of one batch at each stage of a method, in the order of the stages.

    ``images`` ``(N or m, C, H, W)`` are "clean", "mixed", "selected" and "perturbed" ones; ``selected`` ``(m,)`` are
    the rows of the batch that were selected.
    """

    images: dict[str, Tensor]
    selected: Tensor

    @property
    def candidates(self) -> Tensor:
        """``(N, C, H, W)``: the images that were selected from."""
        names = list(self.images)
        return self.images[names[names.index("selected") - 1]]


class Observer:
    """Runs the steps of a method on a copy of a model, which is wrapped there if it was plain.

    Every batch meets the copy as the model is: nothing is trained, and buffers are put back.

    ``changed`` are the stages that did something to some batch so far; "clean" and "selected" always.
    """

    def __init__(self, model: nn.Module, method: Method | None, space: PixelSpace, seed: int) -> None:
        self.method: Method = EntProp() if method is None else check_method(method)
        if isinstance(self.method, EntProp) and self.method.lagged:
            # The stages are those of two passes: the lagged step selects and hardens alike, and trains one step later.
            self.method = replace(self.method, lagged=False, equal_budget=False)
        self.space, self.generator = space, torch.Generator().manual_seed(seed)
        self.model = copy.deepcopy(plain_model(model))
        for parameter in self.model.parameters():  # a frozen model is looked at like any other
            parameter.requires_grad_(parameter.is_floating_point())
        ensure_wrapped(self.model, self.method)
        if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self.model.parameters()):
            self.model.float()  # a step of 1/255 is lost in the rounding of half precision
        self.model.train()
        self.changed: set[str] = set()

    def stages(self, images: Tensor, labels: Tensor) -> Stages:
        """Return what the method does to a batch."""
        like = next((p for p in self.model.parameters() if p.is_floating_point()), images)
        images, labels = images.to(like.device, like.dtype), labels.to(like.device)
        mixed = None
        if isinstance(self.method, EntProp) and self.method.mix is not None and self.method.mix_on == "auxiliary":
            # The mixtures before the attack, which nothing outside sees: the same step, same draws, without attack.
            state = self.generator.get_state()
            with torch.random.fork_rng([like.device] if like.device.type == "cuda" else []):
                mixed = self._run(replace(self.method, attack_steps=0, view=None), images, labels)[0].aux_images
            self.generator.set_state(state)
        output, passed = self._run(self.method, images, labels)
        if output.selected is None or output.aux_images is None:
            raise ConfigurationError(
                f"{type(self.method).__name__} selects no images by uncertainty. Expected a method such as EntProp()."
            )
        if mixed is None:
            found = {"clean": images, "mixed": passed, "selected": passed[output.selected]}
        else:
            found = {"clean": images, "selected": passed[output.selected], "mixed": mixed}
        found["perturbed"] = output.aux_images
        self.changed |= {"clean", "selected"}
        for before, stage in itertools.pairwise(found):
            if stage != "selected" and not torch.equal(found[stage], found[before]):
                self.changed.add(stage)
        return Stages(found, output.selected)

    def _run(self, method: Method, images: Tensor, labels: Tensor) -> tuple[StepOutput, Tensor]:
        before = Snapshot(self.model)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Only [0-9]+ images a step go")  # nothing is trained on these statistics
            step = _Watched(self.model, images, labels, self.space, cross_entropy, None, self.generator)
            output = method.step(step)
        before.restore_buffers()
        assert step.passed is not None
        return output, step.passed


class _Watched(Step):
    """A step that keeps the images of its first pass, and whose backwards give images gradients, and weights none."""

    passed: Tensor | None = None
    leaf: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.passed is None:
            self.passed = images.detach()
        self.leaf = images
        return super().forward(images)

    def image_gradient(self, images: Tensor) -> ImageGradient:
        return ImageGradient(self.model, images, by_autograd=True)

    def backward(self, loss: Tensor) -> None:
        if self.leaf is not None and self.leaf.requires_grad:
            (self.leaf.grad,) = torch.autograd.grad(loss, self.leaf, allow_unused=True)


@contextmanager
def observing(
    model: nn.Module,
    data: Iterable[Any],
    method: Method | None,
    space: PixelSpace,
    seed: int,
    progress: bool,
    title: str,
) -> Iterator[tuple[Observer, Iterator[Stages]]]:
    """Give an observer and what it sees in each batch of the data, while the model is :func:`isolated`."""
    with isolated(model, seed):
        observer = Observer(model, method, space, seed)
        batches = batches_of(data, space, progress=progress, title=title, least=2)
        yield observer, (observer.stages(images, labels) for images, labels in batches)


def batches_of(
    data: Iterable[Any], space: PixelSpace, *, progress: bool, title: str, least: int = 1, name: str = "The data"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield checked batches ``(images, labels)``; those of fewer than ``least`` images are left out."""
    check_flag("progress", progress)
    check_batches(data, name)
    done = 0
    with tqdm(desc=title, unit="image", disable=not progress) as bar:
        for number, batch in enumerate(data):
            images, labels = images_and_labels(batch, name)
            labels = check_evaluated(images, labels, space, first=number == 0)
            if len(images) >= least:
                done += len(images)
                yield images, labels
                bar.update(len(images))
    if not done:
        raise DataError(f"{name} holds no batch of at least {least} images.")


@contextmanager
def isolated(model: nn.Module, seed: int) -> Iterator[None]:
    """Check the state of a model, and run the with-block on random numbers of its own, by ``seed``."""
    check_state(model, "The model")
    device = device_of(model, torch.empty(0))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def finite_logits(model: nn.Module, images: Tensor, domain: str | None = None) -> Tensor:
    """Return the logits of :func:`logits_in`, which must be finite."""
    # A DDP forward broadcasts buffers, which would wait for other processes.
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    found = logits_in(model, images, domain)
    check_finite(found, "The model")
    return found
