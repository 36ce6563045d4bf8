"""``model_card``: front matter that the Hub reads scores from, and a section that people read."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.reporting.formatting import versions
from entprop_wrap.robustness.result import RobustnessResult, escaped
from entprop_wrap.utils.options import check_text


def model_card(
    result: RobustnessResult,
    *,
    model: str,
    dataset: str,
    dataset_id: str,
    dataset_split: str | None = None,
    training: str | None = None,
) -> ModelCard:
    """Return a model card: YAML front matter with ``model-index``, and a section on robustness.

        card = model_card(result, model="pets-entprop", dataset="Oxford-IIIT Pet",
                          dataset_id="timm/oxford-iiit-pet", dataset_split="test")
        card.data.license, card.data.base_model = "apache-2.0", "timm/resnet50.a1_in1k"
        card.save("README.md")  # or card.push_to_hub("you/pets-entprop")

    Add what only you know: what the model is for, and what it must not be used for. Scores in the front matter are in
    [0, 1], as Hub metrics are; the section shows percent.

    Args:
        result: Result of the main domain, which is what the published model has.
        model: Name of the model.
        dataset: Name of the evaluation dataset, for people.
        dataset_id: Its id on the Hub; for other data any short word.
        dataset_split: The split that was evaluated on.
        training: A sentence on how it was trained.

    Raises:
        ConfigurationError: ``result`` is not a RobustnessResult; a text is empty or of another type.
    """
    if not isinstance(result, RobustnessResult):
        raise ConfigurationError(f"result must be a RobustnessResult, found {type(result).__name__}.")
    model, dataset = check_text("model", model), check_text("dataset", dataset)
    dataset_id = check_text("dataset_id", dataset_id)
    given = {"dataset_split": dataset_split, "training": training}.items()
    dataset_split, training = (value if value is None else check_text(name, value) for name, value in given)
    data = ModelCardData(
        pipeline_tag="image-classification",
        tags=["image-classification", "robustness", "entprop"],
        datasets=[dataset_id] if "/" in dataset_id else None,
        metrics=["accuracy"],
        model_name=model,
        eval_results=_eval_results(
            result, {"dataset_name": dataset, "dataset_type": dataset_id, "dataset_split": dataset_split}
        ),
    )
    body = f"# {escaped(model)}\n\n{_section(result, dataset, training)}"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _eval_results(result: RobustnessResult, place: dict[str, Any]) -> list[EvalResult]:
    """Return the scores on the dataset, and accuracy on each shift."""

    def entry(kind: str, name: str, value: float, place: dict[str, Any] = place) -> EvalResult:
        task: dict[str, Any] = {"task_type": "image-classification", "task_name": "Image classification"}
        return EvalResult(metric_type=kind, metric_name=name, metric_value=value, **task, **place)

    found = [
        entry("accuracy", "Accuracy (SA)", result.sa),
        entry("robust_accuracy", f"Mean accuracy under corruptions (RA): {result.protocol}", result.ra),
        entry("hscore", "Hscore, harmonic mean of SA and RA", result.hscore),
        entry("mean_class_accuracy", "Mean class accuracy", result.clean.mean_class_accuracy),
        entry("expected_calibration_error", "Expected calibration error, 15 bins", result.clean.calibration_error),
        *(
            entry("adversarial_accuracy", f"Accuracy under {name}", scores.accuracy)
            for name, scores in result.adversarial.items()
        ),
    ]
    for name, scores in result.shifts.items():
        kind = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "shift"
        while kind in [one.dataset_type for one in found]:  # the Hub joins entries of one dataset type
            kind += "-shift"
        found.append(entry("accuracy", "Accuracy", scores.accuracy, {"dataset_name": name, "dataset_type": kind}))
    return found


def _section(result: RobustnessResult, dataset: str, training: str | None) -> str:
    parts = [
        "## Robustness",
        f"Evaluated on {escaped(dataset)}. SA is accuracy on images as they are, RA the plain mean over all "
        "corruptions and severities (not the mean corruption error), Hscore their harmonic mean (EntProp, Enomoto, UAI "
        "2024).",
        replace(result, auxiliaries={}).to_markdown(),  # the published model has none
    ]
    if training:
        parts.append(escaped(training))
    said = ", ".join(f"{key} {value}" for key, value in versions().items())
    return "\n\n".join([*parts, f"Measured with {said}."]) + "\n"
