"""``feature_distance`` and ``feature_picture``: where a method's images lie in the model's own feature space."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.diagnostics.frechet import Covariance, frechet_distance
from entprop_wrap.diagnostics.method_stages import logits_in, observing
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.methods.base import Method
from entprop_wrap.robustness.pixels import space_of
from entprop_wrap.robustness.result import escaped, markdown_table
from entprop_wrap.utils.features import features_of
from entprop_wrap.utils.options import check_choice, check_seed
from entprop_wrap.utils.statistics import Result
from entprop_wrap.wrapping.model import is_wrapped

__all__ = ["FeatureDistance", "FeaturePicture", "feature_distance", "feature_picture"]

_AUXILIARY = "perturbed, auxiliary"


@dataclass(frozen=True)
class FeatureDistance(Result):
    """Fréchet distances of a method's images to clean ones, in squared units of the features.

    Attributes:
        distances: Distances to clean images through the main norms: of "mixed", "selected" and "perturbed" images
            through the main norms, and of "perturbed, auxiliary" ones through the norms that train on them.
        floor: Distance between two random halves of the clean images: what sampling noise alone gives at this number.
        images: Number of images by set, "clean" included. Fewer images are further away, see :func:`frechet_distance`.
        dimensions: Number of features D of what ``layer`` is given.
    """

    distances: dict[str, float]
    floor: float
    images: dict[str, int]
    dimensions: int
    covariance: str
    layer: str

    def to_markdown(self) -> str:
        """Return a table of the distances."""
        rows = [["images", "number", "distance to clean"]]
        rows += [[name, str(self.images[name]), f"{value:.4g}"] for name, value in self.distances.items()]
        rows.append(["half of clean (to the other half)", str(self.images["clean"] // 2), f"{self.floor:.4g}"])
        note = f"{self.dimensions} features before {escaped(self.layer)}, {self.covariance} covariance."
        return f"{markdown_table(rows)}\n\n{note}"


@dataclass(frozen=True)
class FeaturePicture(Result):
    """Features of both domains in the plane of their two first principal components.

    Attributes:
        points: By set, "clean" (main norms) and "perturbed, auxiliary" (or "perturbed" on a plain model): ``(x, y)``.
        labels: Class of each point, by the same names; of mixed images the first one.
        explained: Share of the variance that each axis holds, in [0, 1].
    """

    points: dict[str, tuple[tuple[float, float], ...]]
    labels: dict[str, tuple[int, ...]]
    explained: tuple[float, float]


def feature_distance(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: Method | None = None,
    covariance: Covariance = "sample",
    layer: str | None = None,
    pixel_space: PixelSpace | None = None,
    max_images: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FeatureDistance:
    """Measure how far mixing, selection and perturbation move images in the model's own feature space.

    As table 6 of EntProp does with the features of an Inception network, which makes the numbers incomparable. Features
    are taken in evaluation mode.

    Arguments and errors are those of :func:`entropy_stages`, and these:

    Args:
        model: A classifier in evaluation mode, wrapped or plain.
        data: Batches as training sees them.
        method: The method to look at; None: ``EntProp()``.
        covariance: "sample", or "shrunk" for few images; see :func:`frechet_distance` for their bias.
        layer: Name of the layer whose input the features are; None: the classifier's head.
        pixel_space: What the data is normalised with; None: nothing.
        max_images: Number of images to stop at; None: all.
        seed: Seed of mixing, dropout, the halves and the order of data.
        progress: Show a progress bar.

    Raises:
        ConfigurationError: Fewer than 4 images.
        ModelOutputError: No layer makes the logits: see ``layer``.
    """
    check_choice("covariance", covariance, ("sample", "shrunk"))
    sets, _, name = _collect(model, data, method, layer, pixel_space, max_images, seed, progress)
    clean = sets["clean"]
    if len(clean) < 4:
        raise ConfigurationError(f"Expected at least 4 images for a distance between two halves, found {len(clean)}.")
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(int(seed)))
    halves = clean[order[: len(clean) // 2]], clean[order[len(clean) // 2 :]]
    return FeatureDistance(
        distances={
            name: frechet_distance(clean, features, covariance=covariance)
            for name, features in sets.items()
            if name != "clean"
        },
        floor=frechet_distance(*halves, covariance=covariance),
        images={name: len(features) for name, features in sets.items()},
        dimensions=clean.shape[1],
        covariance=covariance,
        layer=name,
    )


def feature_picture(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: Method | None = None,
    layer: str | None = None,
    pixel_space: PixelSpace | None = None,
    max_images: int | None = 500,
    seed: int = 0,
    progress: bool = True,
) -> FeaturePicture:
    """Project features of clean images (main norms) and of perturbed ones (auxiliary norms) onto a plane.

    The plane holds the two first principal components of both sets together; signs of axes are arbitrary but fixed.
    Arguments and errors are those of :func:`feature_distance`.
    """
    sets, labels, _ = _collect(
        model, data, method, layer, pixel_space, max_images, seed, progress, ("clean", "perturbed", _AUXILIARY)
    )
    if _AUXILIARY in sets:
        del sets["perturbed"]
    everything = torch.cat(list(sets.values()))
    centred = everything - everything.mean(dim=0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    if len(sizes) < 2:
        raise ConfigurationError(f"A picture needs at least 2 features, found {len(sizes)}.")
    # The largest entry of an axis is made positive, so that two runs give one picture.
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    variance = sizes.square()
    shares = (variance / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)).tolist()
    points = (centred @ axes.mT).split([len(features) for features in sets.values()])
    return FeaturePicture(
        points={name: tuple((x, y) for x, y in part.tolist()) for name, part in zip(sets, points, strict=True)},
        labels={name: tuple(labels[name].tolist()) for name in sets},
        explained=(shares[0], shares[1]),
    )


def _collect(
    model: nn.Module,
    data: Iterable[Any],
    method: Method | None,
    layer: str | None,
    pixel_space: PixelSpace | None,
    max_images: int | None,
    seed: int,
    progress: bool,
    only: tuple[str, ...] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Return features in float64 and labels, both by set, and the layer's name."""
    space, seed = space_of(pixel_space), check_seed(seed)
    features: dict[str, list[Tensor]] = defaultdict(list)
    classes: dict[str, list[Tensor]] = defaultdict(list)
    versions: dict[str, tuple[Tensor, str | None]]
    # The observer copies the model before it is given hooks.
    with (
        observing(model, data, method, space, max_images, seed, progress, "Features") as (observer, batches),
        features_of(model, layer=layer) as recorder,
    ):
        own = observer.method.auxiliaries if is_wrapped(model) else ()
        for stages in batches:
            versions = {name: (version, None) for name, version in stages.images.items()}
            if own:
                versions[_AUXILIARY] = stages.images["perturbed"], own[0]
            for name, (version, domain) in versions.items():
                if only is None or name in only:
                    logits_in(model, version, domain)
                    features[name].append(recorder.last.double().cpu())
                    classes[name].append(stages.labels_of(name).cpu())
    kept = [name for name in features if name in observer.changed or name == _AUXILIARY or only is not None]
    assert recorder.layer is not None
    return (
        {name: torch.cat(features[name]) for name in kept},
        {name: torch.cat(classes[name]) for name in kept},
        recorder.layer,
    )
