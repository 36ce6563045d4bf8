"""``entropy_stages``: what each stage of EntProp does to the entropy of your images."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.diagnostics.method_stages import finite_logits, observing
from entprop_wrap.functional.uncertainty import entropy
from entprop_wrap.methods.base import Method
from entprop_wrap.robustness.result import markdown_table
from entprop_wrap.utils.options import check_seed
from entprop_wrap.utils.statistics import Interval, Result, mean_difference, mean_of

#: What to do about a stage that does not raise entropy.
_ADVICE = {
    "mixed": "Look at the images that mix= makes.",
    "selected": "The uncertainty that the method selects by does not follow entropy on this data.",
    "perturbed": "A long step moves images past the point of highest entropy, towards certain errors, which are hard "
    "all the same: SA and RA tell whether training on them helps. For more uncertain images lower epsilon, or choose a "
    "milder view=; if images hardly move, raise epsilon.",
}


@dataclass(frozen=True)
class EntropyStages(Result):
    """Entropy of the images at each stage of a method, in nats.

    Attributes:
        values: Entropy of each image, by stage.
        stages: Mean entropy by stage, in the order of the method; intervals are over batches.
        changes: By stage, its mean minus that of the stage before it, paired by batch; the first has none.
        classes: Number of classes C; entropy is at most ``log C``.
    """

    values: dict[str, tuple[float, ...]]
    stages: dict[str, Interval]
    changes: dict[str, Interval]
    classes: int
    batches: int

    @property
    def notes(self) -> dict[str, str]:
        """What there is to say of each stage that does not raise entropy, or not beyond chance."""
        return {
            stage: f"The stage {stage!r} does not raise entropy beyond chance: it changes by {change} nats. "
            f"{_ADVICE[stage]}"
            for stage, change in self.changes.items()
            if change.value <= 0 or (change.low is not None and change.low <= 0)
        }

    def rows(self) -> list[list[str]]:
        """Return the cells of a table of the stages, the head first."""
        rows = [["stage", "images", "entropy, nats", "change"]]
        for stage, mean in self.stages.items():
            rows.append([stage, str(len(self.values[stage])), str(mean), str(self.changes.get(stage, ""))])
        return rows

    def to_markdown(self) -> str:
        """Return a table of the stages, and the notes on them."""
        said = f"Entropy is at most {math.log(self.classes):.3g} nats; 95 % intervals over {self.batches} batches."
        return "\n\n".join([markdown_table(self.rows()), said, *self.notes.values()])


def entropy_stages(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: Method | None = None,
    pixel_space: PixelSpace | None = None,
    seed: int = 0,
    progress: bool = True,
) -> EntropyStages:
    """Measure the entropy of clean, mixed, selected and perturbed images, as one and the same model sees them.

    The method's own step says which images are mixed, selected and moved; it runs on a copy of the model. Entropies are
    those that the model itself gives in evaluation mode, through its main norms, at every stage. A stage that the
    method leaves out, or that changes no pixel, is absent.

    Args:
        model: A classifier in evaluation mode, wrapped or plain; as a plain one would be on its first step.
        data: Batches ``(images, labels)`` or dicts, as training sees them: ``fraction`` is one of each batch. A rest of
            a single image is left out.
        method: The method to look at; None: ``EntProp()``. It has to select images.
        pixel_space: What the data is normalised with; None: nothing.
        seed: Seed of mixing, dropout and the order of data.
        progress: Show a progress bar.

    Warns:
        UserWarning: Mixing or selection does not raise entropy, or not beyond chance; or perturbed images are no less
            certain than those they were selected from. (A long step lowers the entropy of the selected images without
            that: it climbs the loss, past the boundary to the next class.)

    Raises:
        ConfigurationError: The model is in training mode; a method that selects nothing; an option out of range.
        UnsupportedModelError: The model is inside an ``auxiliary()`` block, or not a module.
        AuxiliaryNameError: The model was wrapped without an auxiliary that the method needs.
        DataError, ImageError, PixelRangeError, LabelError: Data of another form, or outside ``pixel_space``.

    Source: the stages of EntProp (Enomoto, UAI 2024, Algorithm 1); figure and wording of the question are ours.
    """
    space, seed = space_of(pixel_space), check_seed(seed)
    found: dict[str, list[Tensor]] = defaultdict(list)
    classes = 0
    with observing(model, data, method, space, seed, progress, "Entropies") as (observer, batches):
        for stages in batches:
            for stage, version in stages.images.items():
                output = finite_logits(model, version)
                classes = output.shape[1]
                found[stage].append(entropy(output).cpu().double())
    found = {stage: batches for stage, batches in found.items() if stage in observer.changed}
    result = EntropyStages(
        values={stage: tuple(torch.cat(batches).tolist()) for stage, batches in found.items()},
        stages={stage: mean_of(batches) for stage, batches in found.items()},
        changes={stage: mean_difference(found[stage], found[before]) for before, stage in itertools.pairwise(found)},
        classes=classes,
        batches=len(found["clean"]),
    )
    for stage, note in result.notes.items():
        if stage != "perturbed":  # a long step climbs the loss past the highest entropy, which is not a fault
            warnings.warn(note, stacklevel=2)
    names = list(result.stages)
    before, after = result.stages[names[names.index("selected") - 1]], result.stages.get("perturbed")
    if after is not None and after.value <= before.value:
        warnings.warn(
            f"Perturbed images are no less certain ({after} nats) than those they were selected from ({before}): they "
            "are moved into certain errors. Lower epsilon, or choose a milder view=.",
            stacklevel=2,
        )
    return result
