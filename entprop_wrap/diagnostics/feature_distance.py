"""``feature_distance``: how far a method moves images in the model's own feature space."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.diagnostics.method_stages import finite_logits, observing
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.methods.base import Method
from entprop_wrap.robustness.result import escaped, markdown_table
from entprop_wrap.utils.features import features_of
from entprop_wrap.utils.options import check_seed
from entprop_wrap.utils.statistics import Result
from entprop_wrap.wrapping.model import is_wrapped

_AUXILIARY = "perturbed, auxiliary"


@dataclass(frozen=True)
class FeatureDistance(Result):
    """Fréchet distances of a method's images to clean ones, in squared units of the features.

    Attributes:
        distances: Distances to clean images through the main norms: of "mixed", "selected" and "perturbed" images
            through the main norms, and of "perturbed, auxiliary" ones through the norms that train on them.
        floor: Distance between two random halves of the clean images: what sampling noise alone gives at this number.
        images: Number of images by set, "clean" included. Sets of one distribution are apart by about their sampling
            noise, the more so the fewer images there are for a dimension: compare equal numbers of images only.
        dimensions: Number of features D of what ``layer`` is given.
    """

    distances: dict[str, float]
    floor: float
    images: dict[str, int]
    dimensions: int
    layer: str

    def to_markdown(self) -> str:
        """Return a table of the distances."""
        rows = [["images", "number", "distance to clean"]]
        rows += [[name, str(self.images[name]), f"{value:.4g}"] for name, value in self.distances.items()]
        rows.append(["half of clean (to the other half)", str(self.images["clean"] // 2), f"{self.floor:.4g}"])
        return f"{markdown_table(rows)}\n\n{self.dimensions} features before {escaped(self.layer)}."


def feature_distance(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: Method | None = None,
    layer: str | None = None,
    pixel_space: PixelSpace | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FeatureDistance:
    """Measure how far mixing, selection and perturbation move images in the model's own feature space.

    As table 6 of EntProp does with the features of an Inception network, which makes the numbers incomparable. Features
    are taken in evaluation mode, and are the input of ``layer``, a name in ``model.named_modules()``; None: of the
    classifier's head. The other arguments and errors are those of :func:`entropy_stages`.

    Raises:
        ConfigurationError: Fewer than 4 images.
        ModelOutputError: No layer makes the logits: see ``layer``.

    Source: Dowson & Landau 1982, equation 16; used for images by Heusel et al. (NeurIPS 2017), and in table 6 of
    EntProp (Enomoto, UAI 2024).
    """
    space, seed = space_of(pixel_space), check_seed(seed)
    found: dict[str, list[Tensor]] = defaultdict(list)
    versions: dict[str, tuple[Tensor, str | None]]
    # The observer copies the model before it is given hooks.
    with (
        observing(model, data, method, space, seed, progress, "Features") as (observer, batches),
        features_of(model, layer=layer) as recorder,
    ):
        own = observer.method.auxiliaries if is_wrapped(model) else ()
        for stages in batches:
            versions = {name: (version, None) for name, version in stages.images.items()}
            if own:
                versions[_AUXILIARY] = stages.images["perturbed"], own[0]
            for name, (version, domain) in versions.items():
                finite_logits(model, version, domain)
                found[name].append(recorder.last.cpu().double())
    sets = {name: torch.cat(parts) for name, parts in found.items() if name in {*observer.changed, _AUXILIARY}}
    clean = sets["clean"]
    if len(clean) < 4:
        raise ConfigurationError(f"Expected at least 4 images for a distance between two halves, found {len(clean)}.")
    shuffled = clean[torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))]
    half = len(clean) // 2
    return FeatureDistance(
        distances={name: _frechet(clean, one) for name, one in sets.items() if name != "clean"},
        floor=_frechet(shuffled[:half], shuffled[half:]),
        images={name: len(one) for name, one in sets.items()},
        dimensions=clean.shape[1],
        layer=recorder.layer or "",
    )


def _frechet(a: Tensor, b: Tensor) -> float:
    """Return the squared Fréchet distance between normal distributions fitted to features ``(N, D)`` and ``(M, D)``.

    ``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))``. With ``A = R'R`` and ``B = S'S`` the last trace is the sum of
    the singular values of ``R S'``, which is exact for singular covariances too: fewer images than dimensions.
    """
    (mean_a, root_a), (mean_b, root_b) = _fit(a), _fit(b)
    cross = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(float((mean_a - mean_b).square().sum() + spread), 0.0)


def _fit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean ``(D,)`` and a root ``R`` of the covariance ``R'R``, with at most D rows."""
    mean = features.mean(dim=0)
    root = (features - mean) / (len(features) - 1) ** 0.5
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > features.shape[1] else root
