"""examples/train.py, run as a user runs it, on tiny data: every kind of data and of model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from entprop_wrap import EntProp
from entprop_wrap.errors import ConfigurationError
from tests.examples.in_process import call, load

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
QUICK = ["--epochs", "1", "--robustness-images", "4", "--severities", "3", "--batch-size", "8"]


def train(*arguments, output):
    command = [sys.executable, str(ROOT / "examples" / "train.py"), *map(str, arguments), "--output", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=output.parent, check=False)


def built(monkeypatch, *options, names):
    script = load("examples/train.py", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options), "--methods", *names])
    return script.method_parts.build(script.parse())


def runs(output):
    return {run["method"]: run for run in json.loads((output / "results.json").read_text())["runs"]}


@pytest.fixture
def folder(tmp_path):
    """Return an image folder of two classes, eight images each."""
    dice = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(8):
            pixels = dice.integers(level - 30, level + 30, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def test_digits_with_and_without_entprop(tmp_path):
    output = tmp_path / "out"
    done = train(*QUICK[:-2], "--max-train", 100, output=output)
    assert done.returncode == 0, done.stderr
    assert "| vanilla | 1 |" in done.stdout
    assert "| entprop | 1 |" in done.stdout
    assert "passes per step" in done.stdout
    found = runs(output)
    assert found["vanilla"]["passes_per_step"] == 1
    assert found["entprop"]["passes_per_step"] == pytest.approx(1 + 13 / 64, abs=0.01)
    for run in found.values():
        sa, ra = run["sa"], run["ra"]
        assert run["hscore"] == pytest.approx(2 * sa * ra / (sa + ra) if sa + ra else 0)
    assert (output / "curves.png").stat().st_size > 5000
    weights = load_file(output / "entprop-seed0" / "model" / "model.safetensors")
    assert not [key for key in weights if "entprop" in key]


def test_an_image_folder_with_a_timm_model(tmp_path, folder):
    output = tmp_path / "out"
    arguments = [
        "--dataset",
        folder,
        "--model",
        "test_vit",
        "--image-size",
        160,
        "--attack-steps",
        2,
        "--fraction",
        0.5,
    ]
    done = train(*arguments, "--epsilon", "4/255", "--mix", "cutmix", "--methods", "entprop", *QUICK, output=output)
    assert done.returncode == 0, done.stderr
    assert "no split" in done.stdout or "note:" in done.stdout
    assert runs(output)["entprop"]["passes_per_step"] == 2


def test_a_local_hub_model_and_resuming(tmp_path, folder):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "hub")
    transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(tmp_path / "hub")
    output = tmp_path / "out"
    arguments = ["--dataset", folder, "--model", tmp_path / "hub", "--pretrained", "--in-memory", *QUICK]
    first = train(*arguments, output=output)
    assert first.returncode == 0, first.stderr
    again = train(*arguments, output=output)
    assert again.returncode != 0
    assert "resume" in again.stderr  # nothing is overwritten
    resumed = train(*arguments, "--resume", output=output)
    assert resumed.returncode == 0, resumed.stderr
    model = transformers.AutoModelForImageClassification.from_pretrained(output / "entprop-seed0" / "model")
    assert model.config.id2label == {0: "dark", 1: "light"}
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


def test_every_method_by_name(tmp_path, folder):
    output = tmp_path / "out"
    names = {
        "vanilla": 1,
        "label_smoothing": 1,
        "entropy_maximisation": 1,
        "entprop": 1.5,
        "random_selection": 1.5,
        "shared_norms": 1.5,
        "mixprop": 2,
        "advprop": 3,
        "fine_grained_advprop": 1 + 2 + 2,
        "fast_advprop": 1.5,
        "pgd_at": 2,
        "trades": 3,
    }
    sizes = ["--dataset", folder, *QUICK, "--epochs", 2]
    options = ["--fraction", 0.5, "--attack-steps", 1, "--equal-cost", "--methods", *names]
    done = train(*sizes, *options, output=output)
    assert done.returncode == 0, done.stderr
    found = runs(output)
    assert {name: run["passes_per_step"] for name, run in found.items()} == pytest.approx(names)
    for name in names:
        lines = (output / f"{name}-seed0" / "metrics.jsonl").read_text().splitlines()
        last = max(json.loads(line)["epoch"] for line in lines)
        assert last == (1 if name == "fast_advprop" else 2), name  # 2 / 1.5 epochs, rounded down


def test_options_that_fit_no_method_are_refused(tmp_path):
    unasked = train("--equal-cost", output=tmp_path / "a")
    assert unasked.returncode != 0
    assert "--equal-cost is for fast_advprop" in unasked.stderr
    unmixed = train("--methods", "mixprop", "--mix", "none", *QUICK, output=tmp_path / "b")
    assert unmixed.returncode != 0
    assert "ConfigurationError: mix must be a mixer" in unmixed.stderr
    unknown = train("--methods", "entrop", output=tmp_path / "c")
    assert "fine_grained_advprop" in unknown.stderr


@pytest.mark.parametrize(
    ("names", "options", "found"),
    [
        (["random_selection"], ["--threshold", 1], "--threshold: taken by none of the methods random_selection"),
        (["entprop_finetuning"], ["--fraction", 0.2, "--epsilon", 0.1], "--fraction: taken"),  # also at the default
        (["vanilla", "mixprop"], ["--step-size", "1/255", "--attack-steps", 2], "--attack-steps, --step-size: taken"),
        (["entprop"], ["--mix", "none", "--mix-alpha", 1], "--mix-alpha: taken"),
        (["random_selection", "entprop"], ["--threshold", 1], None),
        (["trades"], ["--entropy-weight", 0.1, "--label-smoothing", 0.1], None),
    ],
)
def test_options_that_no_chosen_method_takes(monkeypatch, names, options, found):
    if found:
        with pytest.raises(ConfigurationError, match=found):
            built(monkeypatch, *options, names=names)
    else:
        built(monkeypatch, *options, names=names)


def test_the_preset_takes_what_is_not_its_own(monkeypatch):
    options = ["--epsilon", "4/255", "--attack-steps", 2, "--step-size", "1/255"]
    made = built(monkeypatch, *options, names=["entprop_finetuning"])["entprop_finetuning"]
    assert made == EntProp.finetuning(epsilon=4 / 255, attack_steps=2, step_size=1 / 255)
    plain = built(monkeypatch, names=["entprop_finetuning"])["entprop_finetuning"]
    assert plain == EntProp.finetuning(epsilon=0.1)  # as every attack on the digits


def test_growth_that_does_not_fit_is_found_before_anything_is_trained(monkeypatch, tmp_path):
    script = load("examples/train.py", monkeypatch)
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("trained"))
    arguments = [*QUICK, "--epochs", 2, "--methods", "vanilla", "me_ada_growth", "--output", tmp_path / "out"]
    with pytest.raises(ConfigurationError, match=r"do not fit into a run of 2 epochs: 1 would") as found:
        call(script, monkeypatch, *arguments)
    assert script.hint(str(found.value)) == "\nOn this command line: --epochs sets how long."
    both = script.hint("Write fit(resume=True), or choose a new output_dir.")
    assert both.endswith(": --resume goes on, --output starts elsewhere.")
    assert script.hint("mix must be a mixer.") == ""


def test_an_unknown_model_says_what_there_is(tmp_path):
    unknown = train("--model", "resnot50", output=tmp_path / "a")
    assert unknown.returncode != 0
    assert "timm.list_models()" in unknown.stderr


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the pets data and the pretrained MobileNetV1 are not beside the checkout"
)
def test_pets_with_the_pretrained_mobilenet(tmp_path):
    output = tmp_path / "out"
    model, pets = SHARED / "mobilenet_v1_0.75_224", SHARED / "pets"
    sizes = ["--image-size", 64, "--max-train", 74, "--max-eval", 37]
    done = train("--dataset", pets, "--model", model, "--pretrained", *sizes, *QUICK, output=output)
    assert done.returncode == 0, done.stderr
    assert "keep probability" in done.stdout
    assert set(runs(output)) == {"vanilla", "entprop"}
