"""``python -m entprop_wrap strip checkpoint.pth plain.pth``: take the auxiliary copies out of a saved checkpoint."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entprop_wrap.errors import CheckpointError
from entprop_wrap.wrapping.state_dict import strip_copies

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m entprop_wrap", description="Tools for files of wrapped models.")
    commands = parser.add_subparsers(dest="command", required=True)
    strip = commands.add_parser(
        "strip",
        help="take the auxiliary copies out of a checkpoint",
        description="Write a checkpoint as the same script would have saved it without entprop_wrap.",
    )
    strip.add_argument("checkpoint", type=Path, help="file written with torch.save, from state_dict()")
    strip.add_argument("plain", type=Path, help="file to write")
    strip.add_argument("--trust", action="store_true", help="read objects besides tensors too, which can execute code")
    options = parser.parse_args(arguments)
    try:
        print(strip_file(options.checkpoint, options.plain, trust=options.trust))
    except (CheckpointError, OSError) as error:
        parser.exit(1, f"{error}\n")


def strip_file(checkpoint: Path, plain: Path, *, trust: bool = False) -> str:
    """Write ``checkpoint`` without its copies to ``plain``, and return what was done in a line.

    The file is read as data: nothing in it is executed, unless you ``trust`` it.

    Raises:
        CheckpointError: The file is not a checkpoint, holds objects that could execute code, or has no copies.
        OSError: A file cannot be read or written.
    """
    loaded = _load(checkpoint, trust)
    stripped = strip_copies(loaded)
    before, after = (sum(1 for _ in _tensors(part)) for part in (loaded, stripped))
    if before == after:
        raise CheckpointError(f"{checkpoint} holds no auxiliary copies: nothing was written.")
    whole = plain.with_name(f"{plain.name}.tmp")
    try:
        torch.save(stripped, whole)
        os.replace(whole, plain)
    finally:
        whole.unlink(missing_ok=True)
    return f"{plain}: {after} tensors; {before - after} of auxiliary copies taken out."


def _load(file: Path, trust: bool) -> Any:
    try:
        # Training scripts save their options beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=not trust)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if _is_zip(file) else []
        holds = f"holds {', '.join(names)}" if names else "is not a file of tensors"
        raise CheckpointError(
            f"{file} {holds}, and was not read: pickled objects can execute code. If you trust it, add --trust."
        ) from error
    except Exception as error:  # what is not a checkpoint fails in any way
        raise CheckpointError(f"{file} is not a checkpoint of torch.save, or is damaged: {error}") from error


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, dict):
        for value in part.values():
            yield from _tensors(value)


if __name__ == "__main__":
    main()
