"""What a report is about: results by model and seed, checked to be of one protocol, and their scores as estimates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.comparison import Comparison, Estimate, compare
from entprop_wrap.robustness.result import RobustnessResult

__all__ = ["Column", "Results", "Studied", "study"]

#: One result; or by the name of a model its result, or one for each seed.
Results: TypeAlias = "RobustnessResult | Mapping[str, RobustnessResult | Sequence[RobustnessResult]]"

_ALONE = "model"


@dataclass(frozen=True)
class Column:
    """A score of the summary.

    Attributes:
        name: Heading.
        get: Returns it, in [0, 1], of one result.
        smaller_is_better: Whether it is an error.
    """

    name: str
    get: Callable[[RobustnessResult], float]
    smaller_is_better: bool = False


@dataclass(frozen=True)
class Studied:
    """Results in one form: for each model one for each seed.

    Attributes:
        results: By model; all of one protocol, and as many for each model.
        comparison: Of the models over the seeds.
        confidence: Of all intervals.
    """

    results: dict[str, tuple[RobustnessResult, ...]]
    comparison: Comparison
    confidence: float

    @property
    def names(self) -> list[str]:
        """Names of the models."""
        return list(self.results)

    @property
    def first(self) -> RobustnessResult:
        """The first result of the first model, which stands for the protocol."""
        return next(iter(self.results.values()))[0]

    @property
    def columns(self) -> list[Column]:
        """The scores of the summary, in their order."""
        attacks = [Column(f"Under {name}", _of("adversarial", name)) for name in self.first.adversarial]
        shifts = [Column(f"SA on {name}", _of("shifts", name)) for name in self.first.shifts]
        return [
            Column("SA", lambda result: result.sa),
            Column("RA", lambda result: result.ra),
            Column("Hscore", lambda result: result.hscore),
            *attacks,
            *shifts,
            Column("Mean class accuracy", lambda result: result.mean_class_accuracy),
            Column("Calibration error", lambda result: result.calibration_error, smaller_is_better=True),
            Column("Calibration error, corrupted", lambda r: r.corrupted_calibration_error, smaller_is_better=True),
        ]

    def estimate(self, column: Column, results: Sequence[RobustnessResult]) -> Estimate:
        """Return mean and interval of a score over seeds."""
        return Estimate.of([column.get(result) for result in results], self.confidence)

    def mean(self, name: str, condition: tuple[str, int]) -> float:
        """Return the accuracy of a model under a corruption, averaged over seeds."""
        found = [result.table[condition] for result in self.results[name]]
        return sum(found) / len(found)

    def check_names(self, argument: str, names: Mapping[str, Any]) -> None:
        """Raise :class:`ConfigurationError` unless all names are those of models."""
        if unknown := [name for name in names if name not in self.results]:
            raise ConfigurationError(
                f"{argument} has an entry {unknown[0]!r}, for which there is no result. Expected the names of the "
                f"results: {', '.join(map(repr, self.names))}."
            )


def study(results: Results, confidence: float) -> Studied:
    """Check results and put them in one form.

    Raises:
        ConfigurationError: No results, of another type, of different protocols, or not as many for each model.
    """
    named: Mapping[Any, Any] = {_ALONE: results} if isinstance(results, RobustnessResult) else results
    if not isinstance(named, Mapping):
        raise ConfigurationError(
            "results must be a RobustnessResult, or a dict of them (or of lists of them, one for each seed) by the "
            f"name of the model; found {type(results).__name__}."
        )
    rows: dict[str, tuple[RobustnessResult, ...]] = {}
    for name, found in named.items():
        row = (found,) if isinstance(found, RobustnessResult) else found
        listed = isinstance(row, Sequence) and not isinstance(row, str)
        if not isinstance(name, str) or not listed or not all(isinstance(one, RobustnessResult) for one in row):
            raise ConfigurationError(
                f"results[{name!r}] must be a RobustnessResult or a list of them, under a name; found "
                f"{type(found).__name__}."
            )
        rows[name] = tuple(row)
    return Studied(rows, compare(rows, confidence=confidence), confidence)


def _of(group: str, name: str) -> Callable[[RobustnessResult], float]:
    def get(result: RobustnessResult) -> float:
        value: float = getattr(result, group)[name].accuracy
        return value

    return get
