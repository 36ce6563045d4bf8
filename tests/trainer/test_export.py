"""What fit() leaves in model/ loads without this package, in another process."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.trainer.export import save_weights
from tests.helpers.launch import python
from tests.helpers.trainer_toys import BatchNormNet, Images, make, tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore:Only . images a step")  # batches are small here


@pytest.fixture
def images(tmp_path):
    images = torch.rand(4, 3, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    return images


def test_exports_load_without_the_package(tmp_path, images):
    expected = {}
    for name, model in (("plain", make(BatchNormNet)), ("vit", tiny_vit())):
        keys = list(model.state_dict())
        config = entprop.TrainerConfig(epochs=1, batch_size=20, output_dir=tmp_path / name, progress=False)
        entprop.Trainer(model, Images(), config=config).fit()
        assert any("entprop" in key for key in model.state_dict())  # it stays wrapped
        assert entprop.unwrap(model) is model
        assert list(model.state_dict()) == keys
        with torch.no_grad():
            output = model.eval()(images)
            expected[name] = output if name == "plain" else output.logits
    python("tests.trainer.programs_without_package", tmp_path)
    found = torch.load(tmp_path / "logits.pt")
    assert torch.equal(found["plain"], expected["plain"])
    torch.testing.assert_close(found["vit"], expected["vit"])
    assert json.loads((tmp_path / "vit/model/config.json").read_text())["architectures"] == [
        "ViTForImageClassification"
    ]
    assert "BatchNormNet" in json.loads((tmp_path / "plain/model/model.json").read_text())["class"]


def test_the_average_is_exported(tmp_path):
    config = entprop.TrainerConfig(epochs=1, batch_size=20, ema_decay=0.5, output_dir=tmp_path, progress=False)
    trainer = entprop.Trainer(make(BatchNormNet), Images(), config=config)
    trainer.fit()
    exported = load_file(tmp_path / "model/model.safetensors")
    average = load_file(trainer.checkpoints.latest() / "ema.safetensors")
    assert exported.keys() == average.keys()
    assert all(torch.equal(exported[key], average[key]) for key in exported)


def test_exporting_again_keeps_other_files(tmp_path):
    config = entprop.TrainerConfig(epochs=1, batch_size=20, output_dir=tmp_path / "run", progress=False)
    trainer = entprop.Trainer(make(BatchNormNet), Images(), config=config)
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    trainer.export(target)
    trainer.fit()
    trainer.export(target)
    assert sorted(path.name for path in target.iterdir()) == ["model.json", "model.safetensors", "notes.txt"]
    exported = load_file(target / "model.safetensors")
    assert torch.equal(exported["fc.weight"], trainer.model.fc.weight)


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
