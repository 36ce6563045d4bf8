"""What a Hugging Face Trainer writes and reads: plain weights, and the auxiliary copies in a file beside them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy

from entprop_wrap.containers import plain_model
from entprop_wrap.errors import CheckpointError
from entprop_wrap.registry import find_registry
from entprop_wrap.state_dicts import (
    auxiliary_state_dict,
    is_auxiliary_key,
    load_auxiliary_state_dict,
    main_state_dict,
    original_name,
    without_copies,
)
from entprop_wrap.step import Method
from entprop_wrap.switch import HOLDER_PREFIX
from entprop_wrap.wrapping import is_wrapped

__all__ = ["AUXILIARY_FILE", "separate_files"]

AUXILIARY_FILE = "entprop_auxiliary.safetensors"


def separate_files(trainer: Any, method: Method) -> None:
    """Make ``trainer`` keep the copies apart from the weights, in all it saves and loads, for good.

    The file of the copies also says which ``method`` trained them.
    """
    name = type(method).__name__
    save: Callable[..., None] = trainer._save
    load: Callable[..., None] = trainer._load_from_checkpoint
    load_best: Callable[..., None] = trainer._load_best_model
    push: Callable[..., None] = trainer._push_from_checkpoint
    decayed: Callable[..., list[str]] = trainer.get_decay_parameter_names

    def _save(output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not is_wrapped(trainer.model):
            return save(output_dir, state_dict=state_dict)
        if state_dict is None:
            state_dict = main_state_dict(trainer.model)
        with without_copies(trainer.model):
            save(output_dir, state_dict={key: value for key, value in state_dict.items() if not is_auxiliary_key(key)})
        if trainer.args.should_save:
            copies = {key: value.contiguous().clone() for key, value in auxiliary_state_dict(trainer.model).items()}
            file = Path(output_dir or trainer.args.output_dir) / AUXILIARY_FILE
            save_file(copies, file, {"format": "pt", "method": name})

    def _load_from_checkpoint(resume_from_checkpoint: str, model: Any = None) -> None:
        check_method_of(trainer.model, Path(resume_from_checkpoint) / AUXILIARY_FILE, name)
        with without_copies(trainer.model):
            load(resume_from_checkpoint, *(() if model is None else (model,)))
        load_checkpoint(trainer, resume_from_checkpoint)

    def _load_best_model() -> None:
        with without_copies(trainer.model):
            load_best()
        load_checkpoint(trainer, trainer.state.best_model_checkpoint)

    def _push_from_checkpoint(checkpoint_folder: str) -> None:
        # The Trainer copies the weights from the checkpoint to its own folder and uploads that. Copies of another step
        # beside them, there or on the Hub, would be taken for theirs.
        file, running = Path(checkpoint_folder) / AUXILIARY_FILE, trainer.push_in_progress
        if not trainer.args.hub_always_push and running is not None and not running.is_done():
            return  # nor would the Trainer push; asked twice, the answers could differ
        if file.is_file() and trainer.is_world_process_zero() and trainer.args.hub_strategy != HubStrategy.END:
            shutil.copy(file, Path(trainer.args.output_dir) / AUXILIARY_FILE)
        push(checkpoint_folder)

    def get_decay_parameter_names(model: Any) -> list[str]:
        names = set(decayed(model))
        return [name for name, _ in model.named_parameters() if original_name(name) in names]

    for replacement in (
        _save,
        _load_from_checkpoint,
        _load_best_model,
        _push_from_checkpoint,
        get_decay_parameter_names,
    ):
        setattr(trainer, replacement.__name__, replacement)


def check_method_of(model: nn.Module, file: Path, method: str) -> None:
    """Compare the auxiliaries and the method in ``file``, if it is there, with those of this run.

    Raises:
        CheckpointError: Other auxiliaries: neither the copies nor the state of the optimizer fit.
    """
    if not file.is_file():
        return
    with safe_open(file, "pt") as opened:
        keys, saved = list(opened.keys()), (opened.metadata() or {}).get("method")  # None: of an earlier version
    parts = {part for key in keys for part in key.split(".") if part.startswith(HOLDER_PREFIX)}
    there = sorted(part.removeprefix(HOLDER_PREFIX) for part in parts)
    here = sorted(find_registry(model).auxiliaries) if is_wrapped(model) else []
    if there != here:
        raise CheckpointError(
            f"{file.parent} was trained with {saved or 'a method'} and the auxiliaries {there}; this run trains with "
            f"{method} and {here}, so neither copies nor optimizer fit. Resume with the method that wrote it, or start "
            f"a new run from its weights: model.from_pretrained({str(file.parent)!r})."
        )
    if saved is not None and saved != method:
        warnings.warn(f"{file.parent} was trained with {saved}; the run goes on with {method}.", stacklevel=3)


def load_checkpoint(trainer: Any, folder: str) -> None:
    """Load what the Trainer's own loading leaves out: the auxiliary copies, and weights that are renamed on disk.

    Raises:
        CheckpointError: The checkpoint has no copies, or those of a model that was wrapped differently.
    """
    if not is_wrapped(trainer.model):
        return
    file = Path(folder) / AUXILIARY_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {AUXILIARY_FILE}: it was written without EntPropCallback, or by a method without "
            "auxiliary copies, so its optimizer does not know them. Start a new run from its weights: "
            f"model.from_pretrained({str(folder)!r})."
        )
    load_renamed(trainer.model, Path(folder))
    load_auxiliary_state_dict(trainer.model, load_file(file))


def load_renamed(model: nn.Module, folder: Path) -> None:
    """Load weights that have other names on disk than in the model.

    ``save_pretrained`` of transformers 5 writes ViT, Swin and others under the names that checkpoints on the Hub have;
    the Trainer loads by the names in the model, and goes on with the weights it could not find (seen in 5.23).
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
