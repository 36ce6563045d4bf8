"""What fit() leaves in model/ is a plain model, which loads without this package."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.trainer.export import save_weights
from tests.faults.accidents import equal
from tests.helpers.trainer_toys import BatchNormNet, make, tiny_vit
from tests.helpers.trainers import trainer

pytestmark = pytest.mark.filterwarnings("ignore:Only . images a step")  # batches are small here


def test_exports_load_as_the_plain_model(tmp_path):
    def load_plain(folder):
        plain = make(BatchNormNet)
        plain.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        return plain

    images = torch.rand(4, 3, 8, 8)
    load_hub = transformers.AutoModelForImageClassification.from_pretrained
    for name, model, load in (("plain", make(BatchNormNet), load_plain), ("vit", tiny_vit(), load_hub)):
        keys = list(model.state_dict())
        trainer(tmp_path / name, model, epochs=1).fit()
        assert any("entprop" in key for key in model.state_dict())  # it stays wrapped
        assert entprop.unwrap(model) is model
        assert list(model.state_dict()) == keys
        with torch.no_grad():
            outputs = [part.eval()(images) for part in (model, load(tmp_path / name / "model"))]
        expected, found = (getattr(output, "logits", output) for output in outputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if name == "plain" else 1e-6)
    assert json.loads((tmp_path / "vit/model/config.json").read_text())["architectures"] == [
        "ViTForImageClassification"
    ]


def test_the_average_is_exported(tmp_path):
    run = trainer(tmp_path, epochs=1, ema_decay=0.5)
    run.fit()
    average = load_file(run.checkpoints.latest() / "ema.safetensors")
    assert equal(load_file(tmp_path / "model/model.safetensors"), average)


def test_exporting_again_keeps_other_files(tmp_path):
    run = trainer(tmp_path / "run", epochs=1)
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    run.export(target)
    run.fit()
    run.export(target)
    assert sorted(path.name for path in target.iterdir()) == ["model.safetensors", "notes.txt"]
    exported = load_file(target / "model.safetensors")
    assert torch.equal(exported["fc.weight"], run.model.fc.weight)


def test_tied_and_transposed_weights_load_strictly(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.third = nn.Parameter(torch.rand(3, 4).t())

    model = Tied()
    save_weights(model.state_dict(), tmp_path / "weights.safetensors")
    other = Tied()
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert other.second.weight is other.first.weight
