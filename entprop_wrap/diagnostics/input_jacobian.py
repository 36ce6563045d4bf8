"""``input_jacobian``: how strongly logits react to pixels, image by image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.diagnostics.method_stages import batches_of, isolated
from entprop_wrap.errors import ModelOutputError
from entprop_wrap.methods.input_gradient import gradient_of
from entprop_wrap.robustness.evaluated_model import check_finite, in_domain, logits, logits_in
from entprop_wrap.utils.modules import plain_model
from entprop_wrap.utils.options import check_name
from entprop_wrap.utils.statistics import Interval, Result, mean_of
from entprop_wrap.utils.tensors import refuse_inference_mode

#: Entries of Jacobians that are held at once: half a gigabyte in float32.
_ENTRIES = 2**27


@dataclass(frozen=True)
class InputJacobian(Result):
    """Norms of the Jacobian ``d logits / d pixels`` of each image; pixels are in [0, 1] whatever the normalisation.

    Attributes:
        frobenius: Frobenius norm of each image, in logits per pixel range.
        spectral: Largest singular value of each image: the most that logits move per length of a change.
        frobenius_mean, spectral_mean: Means with a t-interval over batches.
    """

    frobenius: tuple[float, ...]
    spectral: tuple[float, ...]
    frobenius_mean: Interval
    spectral_mean: Interval


def input_jacobian(
    model: nn.Module,
    data: Iterable[Any],
    *,
    auxiliary: str | None = None,
    pixel_space: PixelSpace | None = None,
    progress: bool = True,
) -> InputJacobian:
    """Measure the Jacobian of the logits with respect to the pixels of each image, exactly.

    It takes a forward pass, and as many backward passes as there are classes.

    Args:
        model: A classifier in evaluation mode, wrapped or plain, that treats images of a batch independently there.
        data: Batches ``(images, labels)`` or dicts.
        auxiliary: Auxiliary domain to run in; None: the main one.
        pixel_space: What the data is normalised with; None: nothing.
        progress: Show a progress bar.

    Raises:
        ConfigurationError: The model is in training mode; an option out of range; inference mode is on.
        UnsupportedModelError: The model is inside an ``auxiliary()`` block, or uses reentrant checkpointing.
        NotWrappedError, AuxiliaryNameError: There is no such auxiliary domain.
        ModelOutputError: Logits or Jacobians are not finite.
        DataError, ImageError, PixelRangeError, LabelError: Data of another form, or outside ``pixel_space``.

    Source: the norm by which Jin et al. (2020, arXiv 2011.13538) explain what entropy maximisation does.
    """
    if auxiliary is not None:
        auxiliary = check_name("auxiliary", auxiliary, ", or None for the main one")
    refuse_inference_mode()
    space = space_of(pixel_space)
    frobenius, spectral = [], []
    with isolated(model, seed=0):
        plain_one = plain_model(model)
        for images, _ in batches_of(data, space, progress=progress, title="Jacobians"):
            norms = [_norms(plain_one, part, space, auxiliary) for part in _parts(plain_one, images, auxiliary)]
            frobenius.append(torch.cat([norm[0] for norm in norms]))
            spectral.append(torch.cat([norm[1] for norm in norms]))
    return InputJacobian(
        frobenius=tuple(torch.cat(frobenius).tolist()),
        spectral=tuple(torch.cat(spectral).tolist()),
        frobenius_mean=mean_of(frobenius),
        spectral_mean=mean_of(spectral),
    )


def _parts(model: nn.Module, images: Tensor, auxiliary: str | None) -> list[Tensor]:
    """Cut a batch so that the Jacobians of a part fit into memory."""
    classes = logits_in(model, images[:1], auxiliary).shape[1]
    most = max(1, _ENTRIES // (classes * images[0].numel()))
    return [images[at : at + most] for at in range(0, len(images), most)]


def _norms(model: nn.Module, images: Tensor, space: PixelSpace, auxiliary: str | None) -> tuple[Tensor, Tensor]:
    """Return the Frobenius and the spectral norms ``(N,)``, in float64 on the CPU."""
    pixels = images.detach().clone().requires_grad_()
    with torch.enable_grad(), in_domain(model, auxiliary):
        output = logits(model, pixels)
        check_finite(output, "The model")  # a bias of NaN leaves the Jacobian finite
        # One row of the Jacobians of all images at once: in evaluation mode no image knows of another. Class by class,
        # because vmap over the classes is slower on most models (attention, grouped convolutions) and holds them all.
        ones = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
        rows = [gradient_of(output, pixels, one.expand_as(output), retain_graph=True) for one in ones]
    jacobian = torch.stack(rows)
    jacobian = jacobian.float() if jacobian.dtype in (torch.float16, torch.bfloat16) else jacobian
    jacobian = (jacobian * space.scale(jacobian[0])).transpose(0, 1).flatten(2)  # (N, classes, pixels)
    with torch.autocast(jacobian.device.type, enabled=False):
        gram = (jacobian @ jacobian.mT).cpu().double()
    if not bool(torch.isfinite(gram).all()):
        raise ModelOutputError("Some Jacobians are NaN or infinite. Look for diverged weights, or half precision.")
    squares = torch.linalg.eigvalsh(gram)
    return squares.sum(1).clamp(min=0).sqrt(), squares[:, -1].clamp(min=0).sqrt()
