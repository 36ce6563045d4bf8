"""The model card: the Hub's own parser reads it, and every number in it is the result's."""

import math
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.reporting import model_card
from entprop_wrap.robustness import RobustnessResult
from entprop_wrap.robustness.scores import Scores

SEVERITIES = (1, 5)


def result(attack="PGD-20 4/255", shift="sketch", clean=0.9125):
    def scores(accuracy):
        return Scores(400, accuracy, accuracy - 0.01, 0.3, 0.05 * accuracy)

    return RobustnessResult(
        clean=scores(clean),
        corrupted={
            (name, severity): scores(0.8 - 0.1 * severity - 0.05 * place)
            for place, name in enumerate(("fog", "jpeg_compression"))
            for severity in SEVERITIES
        },
        seed=3,
        shifts={shift: scores(0.613)},
        adversarial={attack: scores(0.00001)},
    )


def card(found=None, **options):
    names = {"model": "pets-entprop", "dataset": "Oxford-IIIT Pet", "dataset_id": "timm/oxford-iiit-pet"}
    return str(model_card(found or result(), **{**names, **options}))


def evaluated(text):
    """Return what the Hub finds in the front matter, by name and type of the metric."""
    return {(one.dataset_name, one.metric_type): one for one in ModelCard(text).data.eval_results}


def test_text_of_numpy_is_text():
    given = {"dataset_split": "test", "training": "12 epochs"}
    assert card(**{name: np.str_(value) for name, value in given.items()}) == card(**given)


def test_the_hub_reads_every_score_exactly():
    found = result()
    text = card(found, dataset_split="test")
    entries = evaluated(text)
    expected = {
        ("Oxford-IIIT Pet", "accuracy"): found.sa,
        ("Oxford-IIIT Pet", "robust_accuracy"): found.ra,
        ("Oxford-IIIT Pet", "hscore"): found.hscore,
        ("Oxford-IIIT Pet", "mean_class_accuracy"): found.clean.mean_class_accuracy,
        ("Oxford-IIIT Pet", "expected_calibration_error"): found.clean.calibration_error,
        ("Oxford-IIIT Pet", "adversarial_accuracy"): 0.00001,
        ("sketch", "accuracy"): 0.613,
    }
    assert {key: one.metric_value for key, one in entries.items()} == expected
    assert all(isinstance(one.metric_value, float) for one in entries.values())
    accuracy = entries["Oxford-IIIT Pet", "accuracy"]
    assert accuracy.task_type == "image-classification"
    assert accuracy.dataset_type == "timm/oxford-iiit-pet"
    assert accuracy.dataset_split == "test"
    robust = entries["Oxford-IIIT Pet", "robust_accuracy"]
    assert found.protocol in robust.metric_name
    assert "PGD-20 4/255" in entries["Oxford-IIIT Pet", "adversarial_accuracy"].metric_name


def test_the_front_matter_holds_what_was_given_and_nothing_empty():
    data = ModelCard(card()).data.to_dict()
    assert data["pipeline_tag"] == "image-classification"
    assert data["datasets"] == ["timm/oxford-iiit-pet"]
    assert data["tags"] == ["image-classification", "robustness", "entprop"]
    assert data["model-index"][0]["name"] == "pets-entprop"
    plain = ModelCard(card(dataset_id="pets")).data.to_dict()
    assert not {"base_model", "license", "datasets"} & plain.keys()  # no Hub id, no link


def test_the_section_holds_every_number():
    found = result()
    text = ModelCard(card(found, training="EntProp, 10 epochs.")).text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    cells = {row[0]: row[1:] for row in rows}

    def percent(value):
        return f"{100 * value:.2f}"

    assert cells["SA"] == [percent(found.sa)]
    assert cells["RA"] == [percent(found.ra)]
    assert cells["Hscore"] == [percent(found.hscore)]
    assert cells["SA on sketch"] == ["61.30"]
    assert cells["under PGD-20 4/255"] == ["0.00"]
    assert cells["Calibration error"] == [percent(found.clean.calibration_error)]
    for name in ("fog", "jpeg_compression"):
        values = [found.table[name, severity] for severity in SEVERITIES]
        assert cells[name.replace("_", r"\_")] == [*map(percent, values), percent(math.fsum(values) / 2)]
    assert cells["mean"] == [*map(percent, found.per_severity.values()), percent(found.ra)]
    assert "Evaluated on Oxford-IIIT Pet." in text
    assert f"RA: {found.protocol}." in text
    assert "EntProp, 10 epochs." in text


@pytest.mark.parametrize(
    "name",
    [
        'quote " and \\ backslash',
        "colon: # hash - [x] {y} & *star",
        "two\nlines\ttab",
        "---",
        "ü é 猫 🐈 \u2028 \x85 \x7f",
        "yes",
        "1e3",
        "<script>|a|b|</script> `code`",
    ],
)
def test_any_name_survives(name):
    text = card(result(attack=name, shift=name), model=name, dataset=name, dataset_id=name)
    data = ModelCard(text).data.to_dict()
    assert data["model-index"][0]["name"] == name
    own, shift = data["model-index"][0]["results"]
    assert own["dataset"] == {"name": name, "type": name}
    assert shift["dataset"]["name"] == name
    assert any(metric["name"] == f"Accuracy under {name}" for metric in own["metrics"])
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in body
    for line in body.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 5)  # no cell is cut in two


def test_it_saves_itself_with_what_was_added(tmp_path):
    found = model_card(result(), model="m", dataset="d", dataset_id="d")
    found.data.license, found.data.base_model = "mit", "timm/resnet50.a1_in1k"
    found.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == found.data.to_dict()
    assert (data["license"], data["base_model"]) == ("mit", "timm/resnet50.a1_in1k")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": " "}, "dataset must be text, found ' '"),
        ({"model": None}, "model must be text, found None"),
        ({"dataset_id": 3}, "dataset_id must be text, found 3"),
        ({"dataset_split": 3}, "dataset_split must be text"),
        ({"training": 3}, "training must be text"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        card(**options)


def test_what_is_not_a_result_is_refused():
    with pytest.raises(ConfigurationError, match="RobustnessResult, found dict"):
        card({"sa": 1})
