"""State dicts of a wrapped model, split into the model's own weights and the auxiliary copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from entprop_wrap.containers import plain_model
from entprop_wrap.errors import CheckpointError
from entprop_wrap.switch import HOLDER_PREFIX, SwitchedNorm

__all__ = [
    "auxiliary_state_dict",
    "is_auxiliary_key",
    "load_auxiliary_state_dict",
    "main_state_dict",
    "original_name",
    "without_copies",
]


def main_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without the copies, under the plain model's own keys: it loads without this package."""
    return _part(model, auxiliary=False)


def auxiliary_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the copies' part of the state dict: all that :func:`main_state_dict` leaves out."""
    return _part(model, auxiliary=True)


def load_auxiliary_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`auxiliary_state_dict` returned; the main weights stay as they are.

    Raises:
        CheckpointError: Keys are missing or unexpected: the model was wrapped with other options.
    """
    root = plain_model(model)
    expected = {key for key in root.state_dict() if is_auxiliary_key(key)}
    if missing_or_foreign := expected ^ set(state):
        raise CheckpointError(
            f"The checkpoint's auxiliary copies do not fit the model: {len(expected - set(state))} missing and "
            f"{len(set(state) - expected)} unexpected, for example {sorted(missing_or_foreign)[0]!r}. Wrap the model "
            "with the same auxiliaries=, copies=, include= and exclude= as in the run that saved it."
        )
    root.load_state_dict(dict(state), strict=False)


@contextmanager
def without_copies(model: nn.Module) -> Iterator[None]:
    """Show ``model`` without its copies in the with-block, to code that saves or loads plain weights by what it finds.

        with without_copies(model):
            model.save_pretrained(folder)

    Do not run the model or build optimizers in there; loaded weights leave the copies as they are. Needed for adapters
    of PEFT that hold norm layers (``modules_to_save``): they take names from the modules, whatever state dict is given.
    """
    norms = [module for module in plain_model(model).modules() if isinstance(module, SwitchedNorm)]
    held = [
        (norm, {name: child for name, child in norm._modules.items() if name.startswith(HOLDER_PREFIX)})
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
    state: dict[str, Tensor] = plain_model(model).state_dict()
    for keys in (state, getattr(state, "_metadata", {})):
        for key in [key for key in keys if is_auxiliary_key(key) != auxiliary]:
            del keys[key]
    return state


def is_auxiliary_key(key: str) -> bool:
    """Say whether a state-dict key or parameter name belongs to an auxiliary copy."""
    return any(part.startswith(HOLDER_PREFIX) for part in key.split("."))


def original_name(key: str) -> str:
    """Return the name of what ``key`` is a copy of, or ``key`` itself."""
    return ".".join(part for part in key.split(".") if not part.startswith(HOLDER_PREFIX))
