"""A model card: front matter that the Hub reads scores from, and a section that people read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.reporting.provenance import versions
from entprop_wrap.robustness.reporting.wording import name_of, percent
from entprop_wrap.robustness.result import RobustnessResult, markdown_table

__all__ = ["model_card"]


def model_card(
    result: RobustnessResult,
    *,
    model: str,
    dataset: str,
    dataset_id: str,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    training: str | None = None,
    command: str | None = None,
) -> str:
    """Return a model card in Markdown: YAML front matter with ``model-index``, and a section on robustness.

        Path("README.md").write_text(model_card(result, model="pets-entprop", dataset="Oxford-IIIT Pet",
                                                dataset_id="timm/oxford-iiit-pet", dataset_split="test"))

    It is a whole ``README.md``; add what only you know: what the model is for, and what it must not be used for. Scores
    in the front matter are in [0, 1], as Hub metrics are; the section shows percent.

    Args:
        result: Of the main domain, which is what the published model has.
        model: Name of the model.
        dataset: Name of the data set that was evaluated on, for people.
        dataset_id: Its id on the Hub; for other data any short word.
        dataset_config: Its configuration.
        dataset_split: The split that was evaluated on.
        base_model: Hub id of the model that was fine-tuned.
        license: Identifier of a licence, as the Hub lists them: "apache-2.0".
        tags: More tags.
        training: A sentence on how it was trained.
        command: Command line that led here.

    Raises:
        ConfigurationError: No result, or ``model``, ``dataset`` or ``dataset_id`` is empty.
    """
    if not isinstance(result, RobustnessResult):
        raise ConfigurationError(f"result must be a RobustnessResult, found {type(result).__name__}.")
    for name, value in (("model", model), ("dataset", dataset), ("dataset_id", dataset_id)):
        if not isinstance(value, str) or not value.strip():
            raise ConfigurationError(f"{name} must be a name, found {value!r}.")
    source = {"config": dataset_config, "split": dataset_split}
    place = {"name": dataset, "type": dataset_id, **{key: value for key, value in source.items() if value}}
    front: dict[str, Any] = {
        "license": license,
        "base_model": base_model,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "robustness", "entprop", *tags],
        "datasets": [dataset_id] if "/" in dataset_id else None,
        "metrics": ["accuracy"],
        "model-index": [{"name": model, "results": _results(result, place)}],
    }
    front = {key: value for key, value in front.items() if value}
    section = _section(result, dataset, training, command)
    return "\n".join(["---", *_yaml(front), "---", "", f"# {_text(model)}", "", section])


def _results(result: RobustnessResult, place: dict[str, str]) -> list[dict[str, Any]]:
    """Return the entries of ``model-index``: one for the data set, and one for each shift."""
    metrics = [
        ("accuracy", "Accuracy (SA)", result.sa),
        ("robust_accuracy", f"Mean accuracy under corruptions (RA): {result.protocol}", result.ra),
        ("hscore", "Hscore, harmonic mean of SA and RA", result.hscore),
        ("mean_class_accuracy", "Mean class accuracy", result.mean_class_accuracy),
        ("expected_calibration_error", "Expected calibration error, 15 bins", result.calibration_error),
        *(("adversarial_accuracy", f"Accuracy under {name}", one.accuracy) for name, one in result.adversarial.items()),
    ]
    found = [_entry(place, metrics)]
    for name, scores in result.shifts.items():
        kind = _slug(name)
        # The Hub joins entries that have the data set of another.
        while kind in [entry["dataset"]["type"] for entry in found]:
            kind += "-shift"
        found.append(_entry({"name": name, "type": kind}, [("accuracy", "Accuracy", scores.accuracy)]))
    return found


def _entry(place: dict[str, str], metrics: Sequence[tuple[str, str, float]]) -> dict[str, Any]:
    return {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": place,
        "metrics": [{"type": kind, "value": value, "name": name} for kind, name, value in metrics],
    }


def _section(result: RobustnessResult, dataset: str, training: str | None, command: str | None) -> str:
    scores = [["score", "%"], ["clean accuracy (SA)", percent(result.sa)]]
    scores += [["accuracy under corruptions (RA)", percent(result.ra)], ["Hscore", percent(result.hscore)]]
    scores += [[f"accuracy under {_text(name)}", percent(one.accuracy)] for name, one in result.adversarial.items()]
    scores += [[f"accuracy on {_text(name)}", percent(one.accuracy)] for name, one in result.shifts.items()]
    scores += [
        ["mean class accuracy", percent(result.mean_class_accuracy)],
        ["expected calibration error", percent(result.calibration_error)],
        ["expected calibration error, corrupted", percent(result.corrupted_calibration_error)],
    ]
    grid = [["accuracy, %", *(f"severity {one}" for one in result.severities), "mean"]]
    for name, mean in result.per_corruption.items():
        cells = [percent(result.table[name, severity]) for severity in result.severities]
        grid.append([name_of(name), *cells, percent(mean)])
    grid.append(["mean", *(percent(value) for value in result.per_severity.values()), percent(result.ra)])
    said = ", ".join(f"{key} {value}" for key, value in versions().items())
    parts = [
        "## Robustness",
        f"Evaluated on {_text(dataset)}: {result.protocol}.",
        markdown_table(scores),
        "SA is accuracy on images as they are, RA the plain mean over all corruptions and severities (not the mean "
        "corruption error), Hscore their harmonic mean (EntProp, Enomoto, UAI 2024).",
        markdown_table(grid),
    ]
    if training:
        parts.append(_text(training))
    if command:
        fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", command)), default=0))
        parts.append(f"{fence}\n{command}\n{fence}")
    return "\n\n".join([*parts, f"Measured with {said}."]) + "\n"


def _text(words: str) -> str:
    """Return words on one line that Markdown shows as they are."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~])", r"\\\1", " ".join(words.split()))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "shift"


def _yaml(value: dict[str, Any] | list[Any], indent: int = 0) -> list[str]:
    """Return block YAML of dicts, lists, text and numbers, so that the core needs no package for it."""
    pad = "  " * indent
    lines: list[str] = []
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, (dict, list)):
                lines += [f"{pad}{key}:", *_yaml(item, indent + isinstance(item, dict))]
            else:
                lines.append(f"{pad}{key}: {_scalar(item)}")
        return lines
    for item in value:
        if isinstance(item, dict):
            first, *rest = _yaml(item, indent + 1)
            lines += [f"{pad}- {first.lstrip()}", *rest]
        else:
            lines.append(f"{pad}- {_scalar(item)}")
    return lines


def _scalar(value: str | float) -> str:
    if isinstance(value, str):
        # What JSON writes is YAML, but for characters that YAML wants escaped, and JSON does not.
        text = json.dumps(value, ensure_ascii=False)
        return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)
    return format(Decimal(repr(value)), "f")  # YAML 1.1 takes 1e-05 for text
