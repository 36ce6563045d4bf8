"""examples/train.py, run as a user runs it, on tiny data: every kind of data and of model."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from entprop_wrap import EntProp, Vanilla, selection
from entprop_wrap.errors import CheckpointError, ConfigurationError, PixelRangeError
from entprop_wrap.methods import MEADA, AdversarialTraining, AdvProp, EntropyAscent, FastAdvProp, MixProp
from entprop_wrap.methods.experimental import EntropicRetraining
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
    return script.method_parts.build(script.parse(""))


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


def test_an_augmentation_is_for_training_images_only(tmp_path):
    plain = train(*QUICK, "--max-train", 40, "--methods", "vanilla", output=tmp_path / "plain")
    augmented = train(*QUICK, "--max-train", 40, "--methods", "vanilla", "--augment", "augmix", output=tmp_path / "aug")
    assert plain.returncode == augmented.returncode == 0, augmented.stderr
    first, second = (runs(tmp_path / name)["vanilla"] for name in ("plain", "aug"))
    assert first != second
    assert train("--augment", "mixup", output=tmp_path / "no").returncode == 2


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
        "me_ada": 1 + 0.5 * (1 + 1),
        "me_ada_growth": 1,
        "pgd_at": 2,
        "trades": 3,
    }
    sizes = ["--dataset", folder, *QUICK, "--epochs", 3, "--set", "ascent.steps=1"]
    options = ["--fraction", 0.5, "--attack-steps", 1, "--equal-cost", "--methods", *names]
    done = train(*sizes, *options, output=output)
    assert done.returncode == 0, done.stderr
    found = runs(output)
    assert {name: run["passes_per_step"] for name, run in found.items()} == pytest.approx(names)
    for name in names:
        lines = (output / f"{name}-seed0" / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert last["epoch"] == (2 if name == "fast_advprop" else 3), name  # 3 / 1.5 epochs
        if name in ("vanilla", "me_ada_growth"):
            assert last["step"] == (3 if name == "vanilla" else 1 + 3 + 6)  # 12 images, then 24, then 48


def test_retraining_goes_on_with_trained_weights(monkeypatch, tmp_path, folder):
    script, sizes = load("examples/train.py", monkeypatch), [*QUICK, "--dataset", folder, "--output", tmp_path]
    call(script, monkeypatch, *sizes, "--methods", "vanilla")
    weights = tmp_path / "vanilla-seed0" / "model"
    still = ["--learning-rate", 1e-9, "--weight-decay", 0]
    call(script, monkeypatch, *sizes, "--methods", "entropic_retraining", "--weights", weights, *still)
    before = load_file(weights / "model.safetensors")
    after = load_file(tmp_path / "entropic_retraining-seed0" / "model" / "model.safetensors")
    for key in ("0.weight", "1.weight", "14.weight"):
        torch.testing.assert_close(after[key], before[key])


def test_retraining_an_untrained_model_is_refused(monkeypatch, tmp_path, capfd):
    script = load("examples/train.py", monkeypatch)
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit):
        call(script, monkeypatch, *QUICK, "--methods", "vanilla", "entropic_retraining", "--output", tmp_path)
    assert "entropic_retraining goes on with a trained model" in capfd.readouterr().err
    arguments = [*QUICK, "--methods", "vanilla", "--output", tmp_path, "--weights"]
    for path in (tmp_path, tmp_path / "nothing.safetensors", Path(__file__)):
        with pytest.raises(CheckpointError, match=r"--weights .*: expected the weights of this very model"):
            call(script, monkeypatch, *arguments, path)
    save_file({"0.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"Missing key\(s\)"):
        call(script, monkeypatch, *arguments, tmp_path / "other.safetensors")


def test_attacks_seeds_and_what_the_monitor_says(monkeypatch, tmp_path, capfd):
    """The test images have each other's labels: what is learnt makes it worse there."""
    dice = np.random.default_rng(0)
    for split, levels in (("train", (60, 190)), ("validation", (190, 60))):
        for name, level in zip(("dark", "light"), levels, strict=True):
            (tmp_path / "swapped" / split / name).mkdir(parents=True)
            for index in range(8):
                pixels = dice.integers(level - 30, level + 30, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "swapped" / split / name / f"{index}.png")
    output, arguments = tmp_path / "out", [*QUICK, "--dataset", tmp_path / "swapped", "--methods", "vanilla"]
    sizes = ["--epochs", 10, "--optimizer", "sgd", "--learning-rate", 0.1, "--seeds", 2]
    script = load("examples/train.py", monkeypatch)
    with pytest.warns(UserWarning, match="Training and validation part"):
        call(script, monkeypatch, *arguments, *sizes, "--attack", "8/255", "--monitor", "--output", output)
    first, second = json.loads((output / "results.json").read_text())["runs"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert set(first["warnings"]) | set(second["warnings"]) == {"validation"}
    printed = capfd.readouterr().out
    assert "| method | seeds | SA | RA | Hscore | PGD-20 8/255 | seconds | passes per step |" in printed
    assert ": Training and validation part: since evaluation" in printed
    attacked = [100 * run["adversarial"]["PGD-20 8/255"]["accuracy"] for run in (first, second)]
    assert f"| {sum(attacked) / 2:.1f} % ±" in printed
    assert "Under PGD-20 8/255" in (output / "report.html").read_text()


def test_an_attack_beyond_the_pixel_range_is_refused_before_anything_is_trained(monkeypatch, tmp_path):
    script = load("examples/train.py", monkeypatch)
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(PixelRangeError, match="8/255"):
        call(script, monkeypatch, *QUICK, "--attack", 8, "--output", tmp_path)


STRONG = AdvProp().attack.at(0.1)  # epsilon on the digits
HARD = AdversarialTraining().attack.at(0.1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["targeted=true", "attack_statistics=batch"], {"advprop": AdvProp(STRONG, True, "batch")}),
        (
            ["weight = 1/2"],
            {"advprop": AdvProp(STRONG, weight=0.5), "mixprop": MixProp(weight=0.5), "vanilla": Vanilla()},
        ),
        (["advprop.weight=0.5"], {"advprop": AdvProp(STRONG, weight=0.5), "mixprop": MixProp()}),
        (["uncertainty=margin"], {"entprop": EntProp(epsilon=0.1, uncertainty=selection.logit_margin)}),
        (
            ["auxiliary_target=source"],
            {"random_selection": EntProp(epsilon=0.1, uncertainty=selection.random, auxiliary_target="source")},
        ),
        (["ascent.steps=3", "ascent.layer=none"], {"me_ada": MEADA(EntropyAscent(steps=3), fraction=0.2)}),
        (["shuffle=False", "beta=0.25"], {"fast_advprop": FastAdvProp(epsilon=0.1, shuffle=False, beta=0.25)}),
        (
            ["regularise=clean", "clean_weight=0.5"],
            {"pgd_at": AdversarialTraining(HARD, regularise="clean", clean_weight=0.5)},
        ),
        (["attack.norm=l2"], {"pgd_at": AdversarialTraining(replace(HARD, norm="l2"))}),
        (
            ["layers=1", "output_weight=-0.5"],
            {"entropic_retraining": EntropicRetraining(output_weight=-0.5, layers="1")},
        ),
        (["ascent.layer=14"], {"me_ada": MEADA(EntropyAscent(layer="14"), fraction=0.2)}),
    ],
)
def test_fields_that_have_no_flag(monkeypatch, settings, expected):
    assert built(monkeypatch, "--weights", "any", "--set", *settings, names=expected) == expected


@pytest.mark.parametrize(
    ("names", "setting", "found"),
    [
        (["advprop"], "targeted", "expected NAME=VALUE"),
        (
            ["advprop"],
            "targetted=true",
            "no 'targetted' to set in advprop: attack.random_start, attack.norm, targeted,",
        ),
        (["vanilla"], "targeted=true", "no 'targeted' to set in vanilla: nothing"),
        (["mixprop", "advprop"], "mixprop.targeted=true", "no 'targeted' to set in mixprop: weight"),
        (["advprop"], "targeted=maybe", "targeted must be True or False, found 'maybe'"),
        (["advprop"], "weight=1/0", "weight must be a number above 0, found '1/0'"),
        (["entprop"], "uncertainty=entropie", "expected one of entropy, cross-entropy, confidence, margin, random"),
        (
            ["random_selection"],
            "uncertainty=entropy",
            "no 'uncertainty' to set",
        ),  # or it would not be what it is called
        (["trades"], "kind=pgd", "no 'kind' to set"),
        (["shared_norms"], "auxiliary=aux", "no 'auxiliary' to set"),
        (["entprop_finetuning"], "fraction=0.2", "write --fraction for that"),
        (["advprop"], "attack.steps=2", "write --attack-steps for that"),
        (["entprop"], "mix.alpha=2", "write --mix-alpha for that"),
        (["trades"], "attack.epsilon=0.1", "write --epsilon for that"),
    ],
)
def test_fields_that_cannot_be_set(monkeypatch, names, setting, found):
    with pytest.raises(ConfigurationError, match=re.escape(found)):
        built(monkeypatch, "--set", setting, names=names)


def test_every_field_can_be_set_or_has_a_flag(monkeypatch):
    """Of each method but what its name stands for, and what is no plain value."""
    methods = built(
        monkeypatch, "--weights", "any", names=list(load("examples/train.py", monkeypatch).method_parts.METHODS)
    )
    from parts import fields as field_parts
    from parts.methods import flags

    for name, method in methods.items():
        reached = {field.partition(".")[0] for field in field_parts.settable(name, method, flags())}
        left = {field.name for field in fields(method)} - reached - flags() - {"attack"}
        assert left <= {"auxiliary", "kind", "branches"} | ({"uncertainty"} if name == "random_selection" else set())


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
