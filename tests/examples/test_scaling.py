"""docs/scaling.md: its model, its configurations, its recipes; and a trial of benchmarks/gpu.py."""

from pathlib import Path

import pytest
import timm
from accelerate.commands.config.config_args import load_config_from_file
from timm.optim import param_groups_layer_decay

import entprop_wrap as entprop
from tests.helpers.in_process import call, load

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("between", [[], ["--between", "3"]], ids=["default", "slow"])
def test_the_tables_of_the_page_are_what_the_model_says(between, monkeypatch):
    script = load("benchmarks/scaling.py", monkeypatch)
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert "\n".join(script.modelled(script.parse(between))[1:]) in page


def test_there_are_configurations():
    assert [path.stem for path in CONFIGS] == ["ddp", "ddp_hosts", "fsdp2"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.distributed_type.value == ("FSDP" if path.stem == "fsdp2" else "MULTI_GPU")
    assert config.num_processes % config.num_machines == 0
    assert path.stem != "fsdp2" or config.fsdp_config["fsdp_version"] == 2


def test_layer_decay_gives_copies_the_rate_of_their_originals():
    model = entprop.wrap(timm.create_model("test_vit", img_size=32, num_classes=4))
    scale = {}
    for group in param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75):
        scale |= {id(parameter): (group["lr_scale"], group["weight_decay"]) for parameter in group["params"]}
    assert len({rate for rate, _ in scale.values()}) > 2
    for name, norm, copy in model._entprop_registry.copied_parameters():
        assert scale[id(norm)] == scale[id(copy)], name


@pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")
def test_the_gpu_benchmark_runs_in_small(tmp_path, monkeypatch):
    script, output = load("benchmarks/gpu.py", monkeypatch), tmp_path / "RESULTS.md"
    monkeypatch.setattr(script, "SMALL", script.SMALL[:1])
    parts = ["Steps", "The loops of others", "fp16 with a gradient scaler"]
    call(script, monkeypatch, "--small", "--rounds", 2, "--parts", *parts, "--output", output)
    text = output.read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == parts
    assert text.count("lagged, equal budget") >= 2
