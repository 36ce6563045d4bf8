"""``python -m tests.trainer.programs_without_package <folder>``: load what was exported, without entprop_wrap."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.trainer_toys import BatchNormNet, make


def load(folder):
    images = torch.load(Path(folder) / "images.pt")
    plain = make(BatchNormNet).eval()
    plain.load_state_dict(load_file(Path(folder) / "plain/model/model.safetensors"), strict=True)
    from transformers import AutoModelForImageClassification

    vit = AutoModelForImageClassification.from_pretrained(Path(folder) / "vit/model")
    with torch.no_grad():
        torch.save({"plain": plain(images), "vit": vit.eval()(images).logits}, Path(folder) / "logits.pt")


if __name__ == "__main__":
    load(sys.argv[1])
    assert "entprop_wrap" not in sys.modules
