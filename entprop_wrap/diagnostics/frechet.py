"""The Fréchet distance between two sets of features, in float64 and without a matrix square root."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.utils.options import check_choice, shown

__all__ = ["Covariance", "frechet_distance"]

Covariance = Literal["sample", "shrunk"]


def frechet_distance(a: Tensor, b: Tensor, *, covariance: Covariance = "sample") -> float:
    """Return the squared Fréchet distance between normal distributions fitted to two sets of features.

    ``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))``. With ``A = R'R`` and ``B = S'S`` the last trace is the sum of
    the singular values of ``R S'``, which is exact for singular covariances too: fewer images than dimensions.

    Two samples of one distribution are apart by about their sampling noise, the more so the fewer images there are for
    a
    dimension: compare distances of equal numbers of images only. "shrunk" covariances, drawn towards a multiple of the
    identity (Ledoit & Wolf 2004), have far less noise, but count differences in shape and correlation too little.

    Args:
        a: ``(N, D)``, N at least 2.
        b: ``(M, D)``, M at least 2.
        covariance: "sample" or "shrunk".

    Returns:
        At least 0, in squared units of the features.

    Raises:
        ConfigurationError: Other shapes, values that are not finite, or an unknown covariance.

    Source: Dowson & Landau 1982, equation 16; used for images by Heusel et al. (NeurIPS 2017), and in table 6 of
    EntProp (Enomoto, UAI 2024).
    """
    check_choice("covariance", covariance, ("sample", "shrunk"))
    check_values("a", a)
    check_values("b", b)
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != a.shape[1]:
            raise ConfigurationError(
                f"Expected features (N, D) and (M, D) of at least 2 images; found {tuple(a.shape)} and "
                f"{tuple(b.shape)}."
            )
        if not bool(torch.isfinite(features).all()):
            raise ConfigurationError(f"Expected finite features; {name} holds NaN or infinite values.")
    (mean_a, root_a), (mean_b, root_b) = (_fit(features.detach().double().cpu(), covariance) for features in (a, b))
    cross = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(float((mean_a - mean_b).square().sum() + spread), 0.0)


def check_values(name: str, values: object) -> None:
    """Raise :class:`ConfigurationError` unless ``values`` is a tensor of real numbers."""
    real = isinstance(values, Tensor) and not values.is_complex() and not values.is_meta
    if not real or values.layout != torch.strided:  # type: ignore[attr-defined]
        raise ConfigurationError(f"{name} must be a tensor of real numbers, found {shown(values)}.")


def _fit(features: Tensor, covariance: Covariance) -> tuple[Tensor, Tensor]:
    """Return the mean ``(D,)`` and a root ``R`` of the covariance ``R'R``, with at most D rows."""
    number, dimensions = features.shape
    mean = features.mean(dim=0)
    centred = features - mean
    if covariance == "sample":
        root = centred / (number - 1) ** 0.5
    else:
        shrinkage, size = _ledoit_wolf(centred)
        identity = torch.eye(dimensions, dtype=features.dtype)
        root = torch.cat([centred * ((1 - shrinkage) / number) ** 0.5, identity * (shrinkage * size) ** 0.5])
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > dimensions else root


def _ledoit_wolf(centred: Tensor) -> tuple[float, float]:
    """Return how far to shrink, in [0, 1], and the mean variance to shrink to (Ledoit & Wolf 2004, section 3.2)."""
    number, dimensions = centred.shape
    # With few images the Gram matrix of the images holds the same sums as the covariance.
    gram = (centred @ centred.mT if number < dimensions else centred.mT @ centred) / number
    size = float(centred.square().sum()) / number / dimensions
    squares = float(gram.square().sum())  # of the covariance's entries
    distance = squares / dimensions - size**2
    noise = (float(centred.square().sum(dim=1).square().sum()) / number - squares) / number / dimensions
    return (min(max(noise, 0.0), distance) / distance if distance > 0 else 1.0), size
