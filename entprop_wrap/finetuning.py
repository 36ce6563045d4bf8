"""Fine-tuning that keeps what pretraining gave: the head is fitted first, and the weights go half-way back at the end.

    linear_probe(model, loader)  # seconds: one pass over the images
    start = copy.deepcopy(entprop.main_state_dict(model))
    ...                          # fine-tune, with this package or without
    interpolate(model, start)

Both work with plain and with wrapped models; docs/recipes.md has what they gain. MobileNetV1 of the Hub needs a repair
before: :func:`repair_keep_probabilities`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entprop_wrap.data.batches import images_and_labels
from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import check_images, check_labels, checker_of
from entprop_wrap.errors import CheckpointError, DataError, ModelOutputError, UnsupportedModelError
from entprop_wrap.robustness.distributed import check_batches, gather
from entprop_wrap.robustness.evaluated_model import logits as logits_of_images
from entprop_wrap.utils.features import Features, features_of
from entprop_wrap.utils.modules import check_module, evaluating, plain_model, refuse_sharded
from entprop_wrap.utils.options import check_number
from entprop_wrap.utils.tensors import refuse_inference_mode
from entprop_wrap.wrapping.state_dict import main_state_dict

__all__ = ["interpolate", "linear_probe", "repair_keep_probabilities"]

Model = TypeVar("Model", bound=nn.Module)

#: Weights of the L2 penalty, tried from strong to weak until the held-out loss rises.
_PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
_HELD_OUT = 0.2
_FEWEST = 10


def linear_probe(model: nn.Module, data: Iterable[Any]) -> float:
    """Fit the head of a pretrained classifier on its features, in place, before all weights are trained (LP-FT).

    A new head is random, and its first gradients distort the features that pretraining has learnt. Here it becomes a
    logistic regression on the features of the model in evaluation mode; all other weights stay as they are. The weight
    of its L2 penalty is chosen on a fifth of the images.

    Args:
        model: A classifier on any device, wrapped or plain, in any mode, not sharded yet. Its logits are the output of
            an ``nn.Linear`` with a bias.
        data: Batches of the training images, ``(images (N, C, H, W), labels (N,))``, or dicts with "pixel_values",
            "images" or "image" and "labels" or "label", normalised as for the model. Images need not be augmented.
            They are read once; what is kept of them, their features, must fit into memory. Several processes each
            go through all images in the same order, and end with the same head.

    Returns:
        Accuracy on the fifth held out, in [0, 1], of the head that was fitted on the rest.

    Raises:
        UnsupportedModelError: The logits do not come from exactly one ``nn.Linear`` with a bias; or the model is
            sharded.
        DataError: There are fewer than ten images, processes see different ones, or the data is of an unknown form.
        ImageError: Images are of another type or shape.
        LabelError: Labels do not fit the model.
        ModelOutputError: The model returns no logits, or none that are finite.

    Source: Kumar et al., ICLR 2022 (arXiv 2202.10054), section 3.
    """
    check_module("linear_probe()", model)
    refuse_inference_mode()
    refuse_sharded("linear_probe()", model)
    head, features, labels = _features(plain_model(model), data)  # a container would have processes wait
    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        mean = features.mean(0)
        scale = (features - mean).std().clamp_min(1e-12)  # one for all, so that a penalty means the same on any net
        scaled = (features - mean) / scale
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
        held, rest = order.tensor_split([round(_HELD_OUT * len(labels))])
        fitted = features.new_zeros(head.out_features, head.in_features + 1)
        best, accuracy, lowest = _PENALTIES[0], 0.0, math.inf
        for penalty in _PENALTIES:
            fitted = _fit(scaled[rest], labels[rest], penalty, fitted)
            logits = _logits(scaled[held], fitted)
            if (loss := F.cross_entropy(logits, labels[held]).item()) >= lowest:
                break
            targets = labels[held].argmax(1) if labels.is_floating_point() else labels[held]
            best, accuracy, lowest = penalty, (logits.argmax(1) == targets).double().mean().item(), loss
        fitted = _fit(scaled, labels, best, fitted)
        fitted = gather(fitted.cpu())[0].to(fitted.device)
    with torch.no_grad():
        weight = fitted[:, :-1] / scale
        head.weight.copy_(weight)
        head.bias.copy_(fitted[:, -1] - weight @ mean)
    torch.clear_autocast_cache()
    return accuracy


def interpolate(model: Model, start: Mapping[str, Tensor], share: float = 0.5) -> Model:
    """Move the main weights of a trained model back towards those it started with, in place (WiSE-FT).

    Pretrained weights are robust to more than what fine-tuning shows them, fine-tuned ones are accurate; between them
    lie weights that are often better at both. It needs a head that was fitted before the start, as by
    :func:`linear_probe`: half of a random head is noise.

    Args:
        model: The trained model, wrapped or plain. Auxiliary copies stay as they are.
        start: The plain state dict when training began, ``copy.deepcopy(main_state_dict(model))``. Statistics of batch
            norms are interpolated like weights; integers stay those of ``model``.
        share: How far to go from ``start``, at 0, to the trained weights, at 1; in [0, 1].

    Returns:
        The model.

    Raises:
        CheckpointError: ``start`` has other names or shapes than the model, is not sharded like it, or is not a copy.
        ConfigurationError: ``share`` is out of range.

    Source: Wortsman et al., CVPR 2022 (arXiv 2109.01903), section 3.
    """
    check_module("interpolate()", model)
    share = check_number("share", share, lambda value: 0 <= value <= 1, "in [0, 1]")
    now, began = (_tensors(state) for state in (main_state_dict(model), start))
    shapes, others = ({name: value.shape for name, value in state.items()} for state in (now, began))
    if wrong := [name for name in (*now, *began) if shapes.get(name) != others.get(name)]:
        raise CheckpointError(
            f"start does not hold the weights of this {type(model).__name__}: {wrong[0]!r} is missing on one side, or "
            "has another shape. Expected copy.deepcopy(entprop.main_state_dict(model)) from before training."
        )
    if any(hasattr(value, "device_mesh") != hasattr(began[name], "device_mesh") for name, value in now.items()):
        raise CheckpointError(
            "Expected start to be sharded like the model, found only one of the two sharded. After fully_shard() and "
            "before training, write start = copy.deepcopy(entprop.main_state_dict(model))."
        )
    same = (name for name, value in now.items() if value.data_ptr() == began[name].data_ptr() != 0)
    if share < 1 and any(same):
        raise CheckpointError(
            "start holds the model's own tensors, which training has moved: before training, write "
            "start = copy.deepcopy(entprop.main_state_dict(model))."
        )
    done = set()
    with torch.no_grad():
        for name, value in now.items():
            place = getattr(value, "_local_tensor", value).data_ptr(), value.shape  # one tensor may have several names
            if value.is_floating_point() and place not in done:
                value.copy_(began[name].to(value).lerp(value, share))
                done.add(place)
    return model


def repair_keep_probabilities(model: nn.Module) -> list[str]:
    """Undo two conventions of TensorFlow that some converted models carry into PyTorch, where they mean the opposite.

    MobileNetV1 and V2 in transformers drop the share of features that TensorFlow *keeps* in training, 99.9 % and 80 %;
    they and EfficientNet forget their running statistics at every batch, with a momentum of 0.99 or more, the share
    that TensorFlow keeps. Dropout of 0.8 or more and momentum above 0.9 of batch norms are taken for that in any model.

    Returns:
        What was changed, in words.

    Raises:
        UnsupportedModelError: ``model`` is not a module.
    """
    check_module("repair_keep_probabilities()", model)
    notes = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p >= 0.8:
            notes.append(
                f"{name} dropped {module.p:.1%} of its input, surely the share to keep; now {1 - module.p:.1%}"
            )
            module.p = 1 - module.p
    forgetful = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.momentum and m.momentum > 0.9]
    for norm in forgetful:
        norm.momentum = 0.1
    return [*notes, f"{len(forgetful)} batch norms had a momentum above 0.9; now 0.1"] if forgetful else notes


def _tensors(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, without extra state."""
    items = state.items() if isinstance(state, Mapping) else ()
    return {name: value for name, value in items if isinstance(value, Tensor)}


def _features(model: nn.Module, data: Iterable[Any]) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return the head, and features ``(N, D)`` and labels of all images, on the model's device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    head: nn.Module | None = None
    features, targets = [], []
    check_batches(data, "linear_probe()")
    with torch.no_grad(), evaluating(model), features_of(model) as running:
        for batch in data:
            images, labels = images_and_labels(batch, "linear_probe()")
            check_images(images, PixelSpace(), half=True)
            labels = check_labels(labels, images).to(device)
            logits = logits_of_images(model, images)
            checker_of(model).labels(labels, logits.shape[1])
            if not (torch.isfinite(logits).all() and torch.isfinite(running.last).all()):
                raise ModelOutputError(f"Features or logits of {len(images)} images are not finite. Look at the data.")
            if head is None:
                head = model.get_submodule(str(running.layer))
                _check_head(model, head, images, running)
            features.append(_wide(running.last))
            targets.append(labels)
    if head is None or (number := sum(map(len, targets))) < _FEWEST:
        raise DataError(f"linear_probe() needs at least {_FEWEST} images, found {0 if head is None else number}.")
    everything = torch.cat(targets)
    seen = gather(everything.tolist())
    if any(other != seen[0] for other in seen):
        raise DataError(
            f"linear_probe(): the {len(seen)} processes do not go through the same images. Expected all of them, "
            "in order, on each: pass a loader from before accelerator.prepare(), without DistributedSampler or shuffle."
        )
    return cast(nn.Linear, head), torch.cat(features), everything


def _check_head(model: nn.Module, head: nn.Module, images: Tensor, running: Features) -> None:
    """Raise :class:`UnsupportedModelError` unless the logits are the output of ``head``, a linear layer, alone.

    The model is run with other weights in the head: its own may be zero, or computed from other parameters.
    """
    weight, bias = (head._parameters.get(name) for name in ("weight", "bias"))
    if isinstance(head, nn.Linear) and weight is not None and bias is not None:
        kept = weight.clone(), bias.clone()
        try:
            for parameter in (weight, bias):
                parameter.copy_(torch.linspace(0.01, 0.03, parameter.numel()).view_as(parameter))
            torch.clear_autocast_cache()  # it holds the weights from before, rounded
            logits = _wide(logits_of_images(model, images))
            with torch.autocast(logits.device.type, enabled=False):
                own = F.linear(_wide(running.last), _wide(weight), _wide(bias))
        finally:
            weight.copy_(kept[0])
            bias.copy_(kept[1])
            torch.clear_autocast_cache()
        if own.shape == logits.shape and torch.allclose(own, logits, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            return
    raise UnsupportedModelError(
        f"The logits of {type(model).__name__} come from {head}: expected the output of one nn.Linear with a bias and "
        "parameters of its own, and nothing after it. Fine-tune this model without linear_probe()."
    )


def _wide(tensor: Tensor) -> Tensor:
    """Return floats of at least single precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _logits(features: Tensor, fitted: Tensor) -> Tensor:
    return F.linear(features, fitted[:, :-1], fitted[:, -1])


def _fit(features: Tensor, labels: Tensor, penalty: float, start: Tensor) -> Tensor:
    """Return weights and, in the last column, biases ``(C, D + 1)`` of a logistic regression; biases go unpunished."""
    fitted = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([fitted], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(features, fitted), labels) + penalty / 2 * fitted[:, :-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return fitted.detach()
