"""Each example, run as a user runs it, on tiny data."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers

from tests.helpers.image_samples import dark_and_light
from tests.helpers.in_process import ROOT, run_script


def run(folder, name, *arguments, exitcode=0):
    """Run an example in ``folder``; return what it printed."""
    code, printed = run_script(f"examples/{name}", folder, *arguments)
    assert code == exitcode, printed
    return printed


@pytest.fixture
def images(tmp_path):
    return dark_and_light(tmp_path / "images")


@pytest.fixture
def model(tmp_path):
    """Return the folder of a tiny model of the Hub's kind, with its image processor."""
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        layer_type="basic",
        id2label={0: "dark", 1: "light"},
        label2id={"dark": 0, "light": 1},
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_every_example_is_run():
    run_here = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == run_here | {"train.py"}  # in tests/cli


def test_wrap_hub_model(tmp_path, model):
    printed = run(tmp_path, "wrap_hub_model.py", model)
    assert "ResNetForImageClassification: 6 norm layers" in printed
    assert "those of before: True" in printed
    assert "small ResNet" in run(tmp_path, "wrap_hub_model.py", "nobody/no-such-model")  # offline


@pytest.mark.parametrize("name", ["finetune_hf_trainer.py", "finetune_trainer.py"])
def test_finetuning_and_evaluating(tmp_path, images, model, name):
    data = ["--dataset", images, "--image-size", 32, "--max-eval", 2]
    printed = run(tmp_path, name, *data, "--model", model, "--epochs", 1, "--batch-size", 4, "--output", "out")
    assert "Hscore" in printed
    assert "accuracy" in printed
    folder = tmp_path / "out" / ("model" if name == "finetune_trainer.py" else "")
    trained = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert not [key for key in trained.state_dict() if "entprop" in key]

    python, script, *command = shlex.split(printed.splitlines()[-1])
    assert (python, script) == ("python", "examples/evaluate_checkpoint.py")
    assert command[0] == str(folder.relative_to(tmp_path))
    assert command[-2:] == ["--image-size", "32"]
    options = ["--max-eval", 2, "--severities", 3, "--report", "robustness"]
    printed = run(tmp_path, "evaluate_checkpoint.py", *command, *options)
    assert "Hscore" in printed
    assert (tmp_path / "robustness.md").read_text() in printed + "\n"
    assert "Hscore" in (tmp_path / "robustness.html").read_text()
    assert '"clean' in (tmp_path / "robustness.json").read_text()


def test_evaluating_a_model_without_a_processor_says_what_to_pass(tmp_path, images, model):
    (model / "preprocessor_config.json").unlink()
    printed = run(tmp_path, "evaluate_checkpoint.py", model, "--dataset", images, exitcode=2)
    assert "error: Expected an image processor with the model, found none" in printed
    assert "pass --processor" in printed


def test_own_loop(tmp_path):
    printed = run(tmp_path, "own_loop.py", "--epochs", 1)
    assert "aux_entropy" in printed
    assert "test accuracy" in printed
    assert not [key for key in torch.load(tmp_path / "digits.pt", weights_only=True) if "entprop" in key]


def test_timm_loop(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    arguments = ["--model", "test_resnet", "--image-size", 32, "--epochs", 1, "--images", 100]
    printed = run(tmp_path, "timm_loop.py", *arguments)
    assert "BatchNorm" in printed
    assert "epoch 1: accuracy" in printed


def test_lightning_loop(tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    printed = run(tmp_path, "lightning_loop.py", "--epochs", 1)
    assert "aux_entropy" in printed
    assert "keys: model.0.weight" in printed
    assert "entprop_" not in printed.partition("keys:")[2]
