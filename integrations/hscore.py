"""Hscore as a metric of the ``evaluate`` library: SA, RA and their harmonic mean from predictions.

    metric = Hscore()                                     # or evaluate.load("integrations/hscore.py"), offline as well
    for name, severity, batch in ...:
        metric.add_batch(predictions=..., references=..., conditions=[f"{name} {severity}"] * len(batch))
    metric.compute()                                      # {"sa": 0.79, "ra": 0.55, "hscore": 0.65}

Every prediction says which condition its image was in: "clean", or any other text for a corrupted one, such as "fog 3".
"Clean" and texts with space around them are refused, as they would count as conditions of their own.
RA is the plain mean of the accuracies of the other conditions, each counting alike.

Source: EntProp (Enomoto, UAI 2024), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from entprop_wrap.errors import DataError
from entprop_wrap.robustness.scores import hscore

__all__ = ["Hscore"]

_DESCRIPTION = """\
Accuracy on clean images (SA), mean accuracy over corrupted ones (RA), and their harmonic mean (Hscore).
"""

_INPUTS = """\
Args:
    predictions: Predicted class indices.
    references: Class indices, as many.
    conditions: For each image "clean", or the name of what was done to it, such as "fog 3".
Returns:
    sa: Accuracy of the images in the condition "clean", in [0, 1].
    ra: Mean over all other conditions of the accuracy within, in [0, 1].
    hscore: 2 * sa * ra / (sa + ra), or 0 if both are.
"""

_CITATION = """\
@inproceedings{enomoto2024entprop,
  title = {EntProp: High Entropy Propagation for Improving Accuracy and Robustness},
  author = {Enomoto, Shohei},
  booktitle = {Proceedings of the Fortieth Conference on Uncertainty in Artificial Intelligence},
  series = {Proceedings of Machine Learning Research},
  volume = {244},
  pages = {1257--1270},
  year = {2024}
}
"""


class Hscore(evaluate.Metric):
    """SA, RA and Hscore from predictions of the same model under several conditions."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    # As float64, which holds class indices exactly: as int64, evaluate would cut 1.5 down to 1.
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("float64"),
                    "conditions": datasets.Value("string"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2405.18931"],
        )

    def _compute(
        self, predictions: Sequence[float], references: Sequence[float], conditions: Sequence[str], **options: Any
    ) -> dict[str, float]:
        """Return the scores.

        Raises:
            DataError: There is no clean image, or none in another condition; a prediction or reference is no class
                index; a condition is no text, or nearly "clean".
        """
        right = _indices("predictions", predictions) == _indices("references", references)
        names = sorted(_checked(conditions))
        where = np.asarray(conditions)
        if "clean" not in names or len(names) < 2:
            raise DataError(
                "Expected images in the condition 'clean' and in at least one other, such as 'fog 3'; found "
                f"{', '.join(map(repr, names)) or 'none'}."
            )
        accuracy = {name: float(right[where == name].mean()) for name in names}
        sa = accuracy.pop("clean")
        ra = float(np.mean(list(accuracy.values())))
        return {"sa": sa, "ra": ra, "hscore": hscore(sa, ra)}


def _indices(name: str, values: Sequence[float]) -> Any:
    found = np.asarray(values, dtype=np.float64)  # None becomes NaN
    bad = ~(np.isfinite(found) & (found == np.round(found)))
    if bad.any():
        raise DataError(
            f"{name} must be class indices; found {float(found[bad][0])!r} at {int(bad.argmax())}. For scores write "
            "scores.argmax(-1)."
        )
    return found


def _checked(conditions: Sequence[Any]) -> set[str]:
    found = set(conditions)
    for name in found:
        if not isinstance(name, str) or not name.strip():
            raise DataError(
                f"conditions must say 'clean' or what was done to the image, such as 'fog 3'; found {name!r}."
            )
        if name != name.strip() or (name.lower() == "clean" and name != "clean"):
            raise DataError(
                f"Found the condition {name!r}, which would count as one of its own. Write {_usual(name)!r}."
            )
    return found


def _usual(name: str) -> str:
    name = name.strip()
    return "clean" if name.lower() == "clean" else name
