"""State dicts of a wrapped model, split into the model's own weights and the auxiliary copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from entprop_wrap.errors import CheckpointError
from entprop_wrap.utils.modules import check_module, plain_model, walk
from entprop_wrap.utils.options import shown
from entprop_wrap.wrapping.switched_norm import COPY_PREFIX, AuxiliaryNorm, SwitchedNorm

#: What activation checkpointing of torch puts into the names of parameters, and takes out of those of a state dict.
_CHECKPOINTED = "_checkpoint_wrapped_module."


def auxiliary_names(model: nn.Module) -> dict[str, str]:
    """Map the name of each tensor of a copy to the name of what it is a copy of.

    Names are those of ``named_parameters()``, ``named_buffers()`` and ``state_dict()`` of this very ``model``. Copies
    are known by their class: a layer of the model may be called ``entprop_backbone``.
    """
    names = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AuxiliaryNorm):
            norm = path.rpartition(".")[0]
            for tensor in (*module._parameters, *module._buffers):
                names[f"{path}.{tensor}"] = f"{norm}.{tensor}" if norm else tensor
    shown = {name.replace(_CHECKPOINTED, ""): original.replace(_CHECKPOINTED, "") for name, original in names.items()}
    return {**shown, **names}


def main_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without the copies, under the plain model's own keys: it loads without this package."""
    return _part(model, auxiliary=False)


def auxiliary_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the copies' part of the state dict: all that :func:`main_state_dict` leaves out."""
    return _part(model, auxiliary=True)


def load_auxiliary_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`auxiliary_state_dict` returned; the main weights stay as they are.

    Copies loaded by this stay as they are when a checkpoint of the plain model is loaded next, until they are trained.

    Raises:
        CheckpointError: Keys are missing or unexpected, or tensors of another shape: the model was wrapped with other
            options. Nothing is loaded.
    """
    check_module("load_auxiliary_state_dict()", model)
    if not isinstance(state, Mapping):
        raise TypeError(f"load_auxiliary_state_dict() expects a state dict, found {type(state).__name__}.")
    root = plain_model(model)
    current = root.state_dict()
    expected = set(auxiliary_names(root)) & set(current)
    if missing_or_foreign := expected ^ set(state):
        raise CheckpointError(
            f"The checkpoint's auxiliary copies do not fit the model: {len(expected - set(state))} missing and "
            f"{len(set(state) - expected)} unexpected, for example {min(map(str, missing_or_foreign))!r}. Wrap the "
            "model with the same auxiliaries=, copies=, include= and exclude= as in the run that saved it."
        )
    for key, found in state.items():
        if not isinstance(found, Tensor) or found.is_meta or found.shape != current[key].shape:
            raise CheckpointError(
                f"The checkpoint's {key!r} does not fit the model: expected a tensor of shape "
                f"{tuple(current[key].shape)}, found {shown(found)}."
            )
    root.load_state_dict(dict(state), strict=False)
    for module in walk(root):
        if isinstance(module, AuxiliaryNorm):
            module.keep()


@contextmanager
def without_copies(model: nn.Module) -> Iterator[None]:
    """Show ``model`` without its copies in the with-block, to code that saves or loads plain weights by what it finds.

        with without_copies(model):
            model.save_pretrained(folder)

    Do not run the model or build optimizers in there; loaded weights leave the copies as they are. Needed for adapters
    of PEFT that hold norm layers (``modules_to_save``): they take names from the modules, whatever state dict is given.
    """
    check_module("without_copies()", model)
    norms = [module for module in plain_model(model).modules() if isinstance(module, SwitchedNorm)]
    held = [
        (norm, {name: child for name, child in norm._modules.items() if isinstance(child, AuxiliaryNorm)})
        for norm in norms
    ]
    for norm, children in held:
        for name in children:
            del norm._modules[name]
    try:
        yield
    finally:
        for norm, children in held:
            norm._modules.update(children)


def _part(model: nn.Module, *, auxiliary: bool) -> dict[str, Tensor]:
    # Taken out of torch's own dictionary, which carries the version of each module: loading may depend on it.
    check_module("auxiliary_state_dict()" if auxiliary else "main_state_dict()", model)
    root = plain_model(model)
    state: dict[str, Tensor] = root.state_dict()
    names = auxiliary_names(root)
    _keep_only(state, lambda key: (key in names) == auxiliary)
    copies = {name.rpartition(".")[0] for name in names}
    _keep_only(getattr(state, "_metadata", {}), lambda module: (module in copies) == auxiliary)
    return state


def strip_copies(checkpoint: Any) -> Any:
    """Return a checkpoint as the same script would have saved it without this package, whatever it is called inside.

        torch.save(strip_copies(torch.load("checkpoint.pth")), "plain.pth")

    For checkpoints written with plain ``state_dict()``. State dicts are looked for in dictionaries within dictionaries
    (``{"model": ..., "model_ema": ...}``); prefixes such as ``module.`` and ``_orig_mod.`` stay, for the script that
    loads the file to deal with as it always does. Without a model, copies are known by their keys: next to
    ``<norm>.entprop_<auxiliary>.<tensor>`` stands ``<norm>.<tensor>``. The state of an optimizer stays as it was, and
    fits the wrapped model only.

    Args:
        checkpoint: A state dict, or a dictionary that holds some at any depth; it is not changed.
    """
    if not isinstance(checkpoint, Mapping):
        return checkpoint
    copies = {key for key in checkpoint if isinstance(key, str) and _is_copy(key, checkpoint)}
    plain: Any = copy.copy(checkpoint)
    for key in checkpoint:
        if key in copies:
            del plain[key]
        else:
            plain[key] = strip_copies(checkpoint[key])
    if (metadata := getattr(checkpoint, "_metadata", None)) is not None:
        modules = {key.rpartition(".")[0] for key in copies}
        plain._metadata = type(metadata)((name, value) for name, value in metadata.items() if name not in modules)
    return plain


def _is_copy(key: str, keys: Mapping[str, Any]) -> bool:
    norm, _, tensor = key.rpartition(".")
    norm, _, child = norm.rpartition(".")
    return child.startswith(COPY_PREFIX) and (f"{norm}.{tensor}" if norm else tensor) in keys


def _keep_only(entries: dict[str, Any], wanted: Callable[[str], bool]) -> None:
    for key in [key for key in entries if not wanted(key)]:
        del entries[key]
