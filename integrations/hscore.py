"""Hscore as a metric of the ``evaluate`` library: SA, RA and their harmonic mean from predictions.

    metric = Hscore()                                     # or evaluate.load("integrations/hscore.py"), offline as well
    for name, severity, batch in ...:
        metric.add_batch(predictions=..., references=..., conditions=[f"{name} {severity}"] * len(batch))
    metric.compute()                                      # {"sa": 0.79, "ra": 0.55, "hscore": 0.65}

Every prediction says which condition its image was in: "clean", or any other text for a corrupted one, such as "fog 3".

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

_INPUTS = """\
Args:
    predictions: Predicted class indices.
    references: True class indices.
    conditions: For each image "clean", or the name of what was done to it, such as "fog 3".
Returns:
    sa: Accuracy of the images in the condition "clean", in [0, 1].
    ra: Mean over all other conditions of the accuracy within, in [0, 1].
    hscore: 2 * sa * ra / (sa + ra), or 0 if both are.
"""


class Hscore(evaluate.Metric):
    """SA, RA and Hscore from predictions of the same model under several conditions."""

    def _info(self) -> evaluate.MetricInfo:
        # float64 holds class indices exactly; as int64, evaluate would cut 1.5 down to 1
        types = {"predictions": "float64", "references": "float64", "conditions": "string"}
        return evaluate.MetricInfo(
            description="Accuracy on clean images (SA), its mean over corrupted ones (RA), and their harmonic mean.",
            citation="Shohei Enomoto: EntProp. UAI 2024, PMLR 244:1257-1270.",
            inputs_description=_INPUTS,
            features=datasets.Features({name: datasets.Value(kind) for name, kind in types.items()}),
            reference_urls=["https://arxiv.org/abs/2405.18931"],
        )

    def _compute(
        self, predictions: Sequence[float], references: Sequence[float], conditions: Sequence[str], **options: Any
    ) -> dict[str, float]:
        """Return the scores.

        Raises:
            DataError: There is no clean image, or none in another condition; a prediction or reference is not a class
                index; a condition is not text, has spaces around it, or is nearly "clean".
        """
        right = _indices("predictions", predictions) == _indices("references", references)
        for name in (names := set(conditions)):
            text = name.strip() if isinstance(name, str) else ""
            if not text or name != text or (text.lower() == "clean" and text != "clean"):  # would count on its own
                raise DataError(f"conditions must say 'clean' or, without spaces around it, 'fog 3'; found {name!r}.")
        if "clean" not in names or len(names) < 2:
            raise DataError(f"conditions must hold 'clean' and at least one other, found {sorted(names)}.")
        where = np.asarray(conditions)
        accuracy = {name: float(right[where == name].mean()) for name in names}
        sa = accuracy.pop("clean")
        ra = float(np.mean(list(accuracy.values())))
        return {"sa": sa, "ra": ra, "hscore": hscore(sa, ra)}


def _indices(name: str, values: Sequence[float]) -> Any:
    found = np.asarray(values, dtype=np.float64)  # None becomes NaN
    bad = ~(np.isfinite(found) & (found == np.round(found)))
    if bad.any():
        raise DataError(
            f"{name} must be class indices, found {float(found[bad][0])!r} at {int(bad.argmax())}. For scores write "
            "scores.argmax(-1)."
        )
    return found
