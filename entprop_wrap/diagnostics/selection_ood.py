"""``selection_ood``: are the images that a method selects closer to out-of-distribution data than random ones?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.diagnostics.method_stages import batches_of, finite_logits, observing
from entprop_wrap.functional.uncertainty import entropy, least_confidence
from entprop_wrap.methods.base import Method
from entprop_wrap.robustness.corruptions import conditions_of
from entprop_wrap.robustness.result import markdown_table
from entprop_wrap.utils.options import check_seed
from entprop_wrap.utils.statistics import Interval, Result, bootstrap

#: Logits ``(N, C)``, in float64, to scores ``(N,)``; higher is further out of the distribution.
_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_probability": least_confidence,
    "energy": lambda logits: -logits.logsumexp(dim=-1),
    "entropy": entropy,
}


@dataclass(frozen=True)
class OODScore:
    """The result for one score. Groups are "random" (all candidates), "selected" and "perturbed" (as they train).

    Attributes:
        auroc: By group: area under the ROC curve of telling out-of-distribution images from that group, in [0, 1];
            0.5 is a coin.
        fpr95: By group: share of the out-of-distribution images that pass as that group where 95 % of it pass.
        closer: AUROC of "random" minus that of "selected"; above 0, selected images are closer to the
            out-of-distribution images than random ones are.
    """

    auroc: dict[str, Interval]
    fpr95: dict[str, Interval]
    closer: Interval


@dataclass(frozen=True)
class SelectionOOD(Result):
    """Selected images against out-of-distribution ones.

    Attributes:
        scores: By score: "max_probability" (Hendrycks & Gimpel, ICLR 2017), "energy" (Liu et al., NeurIPS 2020,
            temperature 1) and "entropy". A method that selects by entropy makes the first and the last look good by
            construction; the energy is the least circular of the three.
        images, selected, ood: Numbers of images, of selected and of out-of-distribution ones.
        against: What the out-of-distribution images are.
    """

    scores: dict[str, OODScore]
    images: int
    selected: int
    ood: int
    against: str

    def to_markdown(self) -> str:
        """Return a table of AUROC and FPR95 by score and group."""
        rows = [["score", "group", "AUROC", "FPR95"]]
        for name, score in self.scores.items():
            rows += [[name, group, str(score.auroc[group]), str(score.fpr95[group])] for group in score.auroc]
            rows.append([name, "random - selected", str(score.closer), ""])
        note = f"Against {self.ood} images: {self.against}. 95 % bootstrap intervals over batches."
        return f"{markdown_table(rows)}\n\n{note}"


def selection_ood(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: Method | None = None,
    ood: Iterable[Any] | None = None,
    corruptions: Sequence[str] | None = ("gaussian_noise", "fog", "contrast"),
    severities: Sequence[int] = (3,),
    pixel_space: PixelSpace | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SelectionOOD:
    """Compare how well out-of-distribution images can be told from selected images, and from random ones.

    The method's own step selects, on a copy of the model. Scores are those of the model in evaluation mode, through its
    main norms. Out-of-distribution images are batches ``ood``, of the same form and pixel space as ``data``; None:
    ``data`` under ``corruptions``, names from ``entprop_wrap.robustness.SUITES`` (None: the 15 of ImageNet-C; images
    are then at least 32 px), at ``severities`` from 1 (mild) to 5 (strong). The other arguments are those of
    :func:`entropy_stages`.

    Returns:
        AUROC and FPR95 by score and group, with bootstrap intervals over batches. Below ten batches they are rough.

    Raises:
        ConfigurationError: An option is out of range, and what :func:`entropy_stages` raises.
    """
    space, seed = space_of(pixel_space), check_seed(seed)
    conditions = {} if ood is not None else conditions_of(corruptions, severities)
    groups: dict[str, list[Tensor]] = {"random": [], "selected": [], "perturbed": [], "ood": []}
    draws = torch.Generator().manual_seed(seed)
    with observing(model, data, method, space, seed, progress, "Selection") as (_, batches):
        for stages in batches:
            random = finite_logits(model, stages.candidates).cpu().double()  # in this order: MPS has no float64
            groups["random"].append(random)
            groups["selected"].append(random[stages.selected.cpu()])
            groups["perturbed"].append(finite_logits(model, stages.images["perturbed"]).cpu().double())
            if conditions:
                pixels = space.to_pixels(stages.images["clean"])
                versions = [corrupt(pixels, severity, draws) for (_, severity), corrupt in conditions.items()]
                found = [finite_logits(model, space.to_images(version)) for version in versions]
                groups["ood"].append(torch.cat(found).cpu().double())
        if ood is not None:
            title = "Out of distribution"
            others = batches_of(ood, space, progress=progress, title=title, name="ood")
            found = [finite_logits(model, images).cpu().double() for images, _ in others]
            # Cut into as many parts as there are batches, so that these are drawn along with them.
            groups["ood"] = list(torch.cat(found).tensor_split(len(groups["random"])))
    against = "other data" if ood is not None else ", ".join(f"{name} {severity}" for name, severity in conditions)
    return SelectionOOD(
        scores={name: _score(groups, function, draws) for name, function in _SCORES.items()},
        images=sum(map(len, groups["random"])),
        selected=sum(map(len, groups["selected"])),
        ood=sum(map(len, groups["ood"])),
        against=against,
    )


def _score(groups: dict[str, list[Tensor]], score: Callable[[Tensor], Tensor], draws: torch.Generator) -> OODScore:
    scores = {name: [score(logits) for logits in batches] for name, batches in groups.items()}
    names = ("random", "selected", "perturbed")

    def statistics(batches: Sequence[int]) -> list[float]:
        drawn = {name: torch.cat([values[batch] for batch in batches]) for name, values in scores.items()}
        areas = [_auroc(drawn[name], drawn["ood"]) for name in names]
        rates = [_fpr95(drawn[name], drawn["ood"]) for name in names]
        return [*areas, *rates, areas[0] - areas[1]]

    found = bootstrap(statistics, len(groups["random"]), draws)
    return OODScore(dict(zip(names, found[:3], strict=True)), dict(zip(names, found[3:6], strict=True)), *found[6:])


def _auroc(negative: Tensor, positive: Tensor) -> float:
    """Return the probability that a positive score ``(M,)`` is above a negative one ``(N,)``; ties count one half."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive) + torch.searchsorted(ordered, positive, right=True)
    return float(below.double().mean()) / 2 / len(ordered)


def _fpr95(inside: Tensor, outside: Tensor) -> float:
    """Return the share of ``outside`` not above the lowest threshold that at least 95 % of ``inside`` are not above.

    Source: Liu et al., NeurIPS 2020, section 4.1.
    """
    threshold = inside.sort().values[-(-19 * len(inside) // 20) - 1]
    return float((outside <= threshold).double().mean())
