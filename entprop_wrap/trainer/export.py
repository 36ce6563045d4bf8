"""Writing a trained model so that it loads without this package."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from entprop_wrap.utils.files import explaining_failed_writes


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, each key with its own bytes, so that they load with ``strict=True``."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        # The format stores no ties: tied weights become equal ones, which tie again in the model that loads them.
        start = tensor.untyped_storage().data_ptr()
        own[key] = tensor.clone() if start in seen else tensor
        seen.add(start)
    save_file(own, path, metadata={"format": "pt"})


def export_model(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``weights`` as a model of the class of ``model`` into ``folder``, file by file in one go each.

    A Hugging Face model is written by its own ``save_pretrained``, others to ``model.safetensors`` by their own keys.
    Other files in ``folder`` stay.
    """
    with explaining_failed_writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save = getattr(model, "save_pretrained", None)
        if save is not None and "state_dict" in inspect.signature(save).parameters:
            save(partial, state_dict=dict(weights))
        else:
            save_weights(weights, partial / "model.safetensors")
        for file in sorted(partial.iterdir()):
            os.replace(file, folder / file.name)
        partial.rmdir()
