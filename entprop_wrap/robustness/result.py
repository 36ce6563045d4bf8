"""The result of an evaluation: SA, RA and Hscore, the table that they are made of, and its protocol."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.corruptions import SUITES
from entprop_wrap.robustness.scores import Scores, hscore
from entprop_wrap.utils.options import shown


@dataclass(frozen=True)
class RobustnessResult:
    """Scores of one model in one domain. Accuracies are in [0, 1]; Markdown shows percent.

    SA, RA and Hscore are those of EntProp (Enomoto, UAI 2024, section 4.1): RA is the plain mean accuracy over all
    corruptions and severities. It is *not* the mean corruption error, which weighs by a baseline and is :meth:`mce`.

    Attributes:
        clean: Scores on the images as they are.
        corrupted: Scores by ``(corruption, severity)``, in the order of evaluation.
        seed: Seed of the corruptions.
        shifts: Scores on other datasets, by the name they were given.
        adversarial: Scores under attacks, by the name they were given. They enter neither RA nor Hscore.
        auxiliaries: The same for each auxiliary domain of the model, where that was asked for.
    """

    clean: Scores
    corrupted: dict[tuple[str, int], Scores]
    seed: int = 0
    shifts: dict[str, Scores] = field(default_factory=dict)
    adversarial: dict[str, Scores] = field(default_factory=dict)
    auxiliaries: dict[str, RobustnessResult] = field(default_factory=dict)

    @property
    def sa(self) -> float:
        """Accuracy on clean images (standard accuracy)."""
        return self.clean.accuracy

    @property
    def ra(self) -> float:
        """Plain mean accuracy over all corruptions and severities of :attr:`protocol` (robust accuracy)."""
        return fmean(self.table.values())

    @property
    def hscore(self) -> float:
        """Harmonic mean of SA and RA."""
        return hscore(self.sa, self.ra)

    @property
    def table(self) -> dict[tuple[str, int], float]:
        """Accuracy by ``(corruption, severity)``."""
        return {condition: scores.accuracy for condition, scores in self.corrupted.items()}

    @property
    def per_corruption(self) -> dict[str, float]:
        """Mean accuracy over severities, by corruption."""
        return {name: fmean(self.table[name, s] for s in self.severities) for name in self.corruptions}

    @property
    def per_severity(self) -> dict[int, float]:
        """Mean accuracy over corruptions, by severity."""
        return {s: fmean(self.table[name, s] for name in self.corruptions) for s in self.severities}

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Names of the corruptions, in the order of evaluation."""
        return tuple(dict.fromkeys(name for name, _ in self.corrupted))

    @property
    def severities(self) -> tuple[int, ...]:
        """The severities, in the order of evaluation."""
        return tuple(dict.fromkeys(severity for _, severity in self.corrupted))

    @property
    def summary(self) -> dict[str, float]:
        """The scores by name, in [0, 1]: SA, RA and Hscore, accuracy on shifts and under attacks, and calibration."""
        return {
            "SA": self.sa,
            "RA": self.ra,
            "Hscore": self.hscore,
            **{f"SA on {name}": scores.accuracy for name, scores in self.shifts.items()},
            **{f"under {name}": scores.accuracy for name, scores in self.adversarial.items()},
            "Mean class accuracy": self.clean.mean_class_accuracy,
            "Calibration error": self.clean.calibration_error,
            "Calibration error, corrupted": fmean(scores.calibration_error for scores in self.corrupted.values()),
        }

    @property
    def protocol(self) -> str:
        """The corruptions and severities that RA is the mean over; says so when that is not the full protocol."""
        return f"{self.clean.images:,} images, seed {self.seed}, {_in_words(self.corrupted)}"

    def mce(self, baseline: RobustnessResult) -> float:
        """Return the mean corruption error relative to ``baseline``: 1 is the baseline, smaller is better.

        For each corruption, errors summed over severities are divided by those of the baseline; the mean over
        corruptions is mCE. Published values take AlexNet as the baseline, and are in percent.

        Raises:
            ConfigurationError: The baseline is not a result, has another protocol, or makes no error under some
                corruption.

        Source: Hendrycks & Dietterich (ICLR 2019), section 4.
        """
        if not isinstance(baseline, RobustnessResult):
            raise ConfigurationError(
                f"mCE needs the result of a baseline, found {shown(baseline)}. Write mce(evaluate_robustness(...))."
            )
        if measured(baseline) != measured(self):
            raise ConfigurationError(
                f"mCE needs a baseline of the same protocol. Expected {self.protocol}; found {baseline.protocol}."
            )
        ours, theirs = self.per_corruption, baseline.per_corruption
        if perfect := [name for name in theirs if theirs[name] == 1]:
            raise ConfigurationError(f"mCE divides by the errors of the baseline; it has none under {perfect[0]!r}.")
        return fmean((1 - ours[name]) / (1 - theirs[name]) for name in ours)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types, for ``json.dumps``; :meth:`from_dict` reads it back."""
        return {
            "sa": self.sa,
            "ra": self.ra,
            "hscore": self.hscore,
            "protocol": self.protocol,
            "seed": self.seed,
            "clean": asdict(self.clean),
            "corrupted": [{"corruption": n, "severity": s, **asdict(v)} for (n, s), v in self.corrupted.items()],
            "shifts": {name: asdict(scores) for name, scores in self.shifts.items()},
            "adversarial": {name: asdict(scores) for name, scores in self.adversarial.items()},
            "auxiliaries": {name: result.to_dict() for name, result in self.auxiliaries.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RobustnessResult:
        """Return the result that :meth:`to_dict` wrote.

        Raises:
            ConfigurationError: ``data`` is something else.
        """
        try:
            rows = [dict(row) for row in data["corrupted"]]
            rows[0]  # RA is a mean over them
            parts = {
                key: {name: Scores(**scores) for name, scores in data[key].items()} for key in ("shifts", "adversarial")
            }
            return cls(
                clean=Scores(**data["clean"]),
                corrupted={(row.pop("corruption"), row.pop("severity")): Scores(**row) for row in rows},
                seed=data["seed"],
                auxiliaries={name: cls.from_dict(part) for name, part in data["auxiliaries"].items()},
                **parts,
            )
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise ConfigurationError(
                f"Expected what RobustnessResult.to_dict() returns, found {type(data).__name__} (failed at {error})."
            ) from error

    def to_markdown(self) -> str:
        """Return the scores and the table of accuracies in percent, as Markdown."""
        domains = {"main": self, **self.auxiliaries}

        def row(label: str, values: Iterable[float]) -> list[str]:
            return [escaped(label), *(f"{100 * value:.2f}" for value in values)]

        rows = [["domain", *map(escaped, domains)] if self.auxiliaries else ["score", "%"]]
        rows += [row(name, (result.summary[name] for result in domains.values())) for name in self.summary]
        grid = [["accuracy, %", *map(str, self.severities), "mean"]]
        for name, mean in self.per_corruption.items():
            grid.append(row(name, [*(self.table[name, severity] for severity in self.severities), mean]))
        grid.append(row("mean", [*self.per_severity.values(), self.ra]))
        return "\n\n".join([markdown_table(rows), markdown_table(grid), f"RA: {self.protocol}."])


def measured(result: RobustnessResult) -> tuple[int, int, frozenset[tuple[str, int]]]:
    """Return what two results must share to be compared: images, seed and conditions, in whatever order."""
    return result.clean.images, result.seed, frozenset(result.corrupted)


def markdown_table(rows: list[list[str]]) -> str:
    """Return rows of cells, the first being the head, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def escaped(name: str) -> str:
    """Return a name on one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~])", r"\\\1", " ".join(str(name).split()))


def _in_words(conditions: Collection[tuple[str, int]]) -> str:
    """Return what the conditions are, and that they are not a full protocol where that is so."""
    names, severities = (list(dict.fromkeys(part)) for part in zip(*conditions, strict=True))
    suites = {"c": "15 corruptions", "c-bar": "the 10 corruptions of ImageNet-C-bar"}
    suite = next((words for suite, words in suites.items() if set(names) == set(SUITES[suite])), None)
    if suite and set(severities) == {1, 2, 3, 4, 5}:
        return f"{suite} x 5 severities"
    what, at = suite or ", ".join(names), ", ".join(map(str, severities))
    return f"{what} x severity {at} - another protocol, not comparable with a full RA"
