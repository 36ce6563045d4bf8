"""Checkpoints of the Hugging Face Trainer: plain weights, the copies in a file beside them, and which are complete."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy

from entprop_wrap.errors import CheckpointError
from entprop_wrap.methods.lagged import lagged_state, load_lagged_state
from entprop_wrap.utils.files import replacing
from entprop_wrap.utils.modules import plain_model
from entprop_wrap.wrapping.model import is_wrapped
from entprop_wrap.wrapping.registry import find_registry
from entprop_wrap.wrapping.state_dict import (
    auxiliary_state_dict,
    load_auxiliary_state_dict,
    main_state_dict,
    without_copies,
)

__all__ = ["AUXILIARY_FILE", "PlainCheckpoints", "last_complete_checkpoint"]

AUXILIARY_FILE = "entprop_auxiliary.safetensors"
#: What waits for the next lagged step of a process. It holds training images; the Trainer pushes no file named ``_*``.
_LAGGED_FILE = "_entprop_lagged_{}.safetensors"


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest checkpoint of a Trainer that was written to its end, or None.

        trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))

    ``transformers.trainer_utils.get_last_checkpoint`` returns the last folder, even of a run that was killed while it
    saved.

    Args:
        output_dir: The Trainer's ``output_dir``; it need not exist.
    """
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if _damage(path) is None:
            return str(path)
    return None


def _damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if it is whole."""
    # The Trainer writes its state last.
    for file in (checkpoint / "trainer_state.json", *sorted(checkpoint.rglob("*"))):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):  # compares its length with what its header says
                    pass
            elif file.suffix in (".pt", ".pth", ".bin") and file.is_file():
                with zipfile.ZipFile(file) as opened:  # what torch.save writes; its list of contents stands at the end
                    if (bad := opened.testzip()) is not None:
                        return f"{file.name!r} is damaged at {bad!r}"
        except Exception as error:
            return f"{file.name!r} cannot be read ({error})"
    return None


#: The mixin is mixed into a Trainer, of which type checkers know nothing.
_Mixed: Any = object


class PlainCheckpoints(_Mixed):
    """The part of the Trainer that writes and reads: ``model.safetensors`` stays plain, wherever it goes."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not is_wrapped(self.model):
            super()._save(output_dir, state_dict=state_dict)
            return
        copies = auxiliary_state_dict(self.model)
        state_dict = main_state_dict(self.model) if state_dict is None else state_dict
        with without_copies(self.model):
            super()._save(output_dir, state_dict={k: value for k, value in state_dict.items() if k not in copies})
        if self.args.should_save:
            file = Path(output_dir or self.args.output_dir) / AUXILIARY_FILE
            names = " ".join(sorted(find_registry(self.model).auxiliaries))
            method = type(self.entprop.method).__name__
            _save_whole(copies, file, {"format": "pt", "method": method, "auxiliaries": names})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if (damage := _damage(checkpoint)) is not None:
            newest = last_complete_checkpoint(checkpoint.parent)
            raise CheckpointError(
                f"{checkpoint} is not complete: {damage}. "
                f"{f'Resume from {newest}' if newest else 'There is no complete one beside it'}; "
                "entprop_wrap.integrations.hf_trainer.last_complete_checkpoint(output_dir) returns the newest."
            )
        _check_copies(self.model, checkpoint, type(self.entprop.method).__name__)
        with without_copies(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, *(() if model is None else (model,)))
        _load_copies(self.model, checkpoint)
        waiting = checkpoint / _LAGGED_FILE.format(self.args.process_index)
        load_lagged_state(self.model, load_file(waiting) if waiting.is_file() else {})

    def _save_rng_state(self, output_dir: str) -> None:
        # The one thing that every process saves for itself.
        super()._save_rng_state(output_dir)
        if waiting := lagged_state(self.model):
            _save_whole(waiting, Path(output_dir) / _LAGGED_FILE.format(self.args.process_index), {"format": "pt"})

    def _load_best_model(self) -> None:
        with without_copies(self.model):
            super()._load_best_model()
        _load_copies(self.model, Path(self.state.best_model_checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer copies the weights from the checkpoint to its own folder and uploads that. Copies of another step
        # beside them, there or on the Hub, would be taken for theirs.
        file, running = Path(checkpoint_folder) / AUXILIARY_FILE, self.push_in_progress
        if not self.args.hub_always_push and running is not None and not running.is_done():
            return  # nor would the Trainer push; asked twice, the answers could differ
        if file.is_file() and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            shutil.copy(file, Path(self.args.output_dir) / AUXILIARY_FILE)
        super()._push_from_checkpoint(checkpoint_folder)


def _save_whole(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    with replacing(file) as partial:
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, partial, metadata)


def _check_copies(model: nn.Module, folder: Path, method: str) -> None:
    """Compare the auxiliaries and the method of a checkpoint with those of this run."""
    file = folder / AUXILIARY_FILE
    here = sorted(find_registry(model).auxiliaries) if is_wrapped(model) else []
    start = f"start a new run from its weights: model.from_pretrained({str(folder)!r})."
    if not file.is_file():
        if here:
            raise CheckpointError(
                f"{folder} has no {AUXILIARY_FILE}: it was written without EntPropCallback, or by a method without "
                f"auxiliary copies. Resume without the callback, or {start}"
            )
        return
    with safe_open(file, "pt") as opened:
        written = opened.metadata() or {}
    saved, there = written.get("method"), written.get("auxiliaries", "").split()
    if there != here:
        raise CheckpointError(
            f"{folder} was trained with {saved} and the auxiliaries {there}; this run trains with {method} and {here}. "
            f"Resume with the method that wrote it, or {start}"
        )
    if saved != method:
        warnings.warn(f"{folder} was trained with {saved}; the run continues with {method}.", stacklevel=3)


def _load_copies(model: nn.Module, folder: Path) -> None:
    """Load what the Trainer's own loading leaves out: the auxiliary copies, and weights that are renamed on disk."""
    if is_wrapped(model):
        _load_renamed(model, folder)
        load_auxiliary_state_dict(model, load_file(folder / AUXILIARY_FILE))


def _load_renamed(model: nn.Module, folder: Path) -> None:
    """Load weights that have other names on disk than in the model.

    ``save_pretrained`` of transformers 5 writes ViT, Swin and others under the names that checkpoints on the Hub have;
    the Trainer loads by the names in the model, and continues with the weights it could not find (seen in 5.23).
    """
    model, file = plain_model(model), folder / "model.safetensors"
    if not isinstance(model, PreTrainedModel) or not file.is_file():
        return
    expected = main_state_dict(model)
    with safe_open(file, "pt") as opened:
        if set(expected) <= set(opened.keys()):
            return
    state = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    if set(state) != set(expected):
        raise CheckpointError(f"{file} does not hold the weights of this {type(model).__name__}.")
    model.load_state_dict(state, strict=False)
