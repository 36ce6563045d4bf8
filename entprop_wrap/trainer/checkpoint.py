"""Checkpoint folders: written whole or not at all, kept by age and by score, and found again.

checkpoints/step-00000123/
    model.safetensors          the model's own weights, under its own keys
    auxiliary.safetensors      the auxiliary copies, where there are any
    ema.safetensors, ema_auxiliary.safetensors    the moving average, likewise
    optimizer.pt               states of optimizer, schedule and gradient scaler
    process-00000.pt           random states and running averages, for each process
    state.json                 where the run stood, its last evaluation, and what it was run with
checkpoints/growth/
    phase-01.safetensors       what the data has grown, where it does; see growth.py
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from entprop_wrap.errors import CheckpointError

__all__ = ["CheckpointFolder", "better", "read_state"]

_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial"


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: The folder; made with the first checkpoint.
        keep_last: Number of latest checkpoints to keep, None for all.
        keep_best: Evaluation metric of the best checkpoint, which is kept too; None for no such one.
    """

    def __init__(self, path: Path, keep_last: int | None, keep_best: str | None) -> None:
        self.path, self.keep_last, self.keep_best = path, keep_last, keep_best

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first. Renaming is atomic, so what bears the name is complete."""
        if not self.path.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.path.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def latest(self) -> Path | None:
        """Return the latest checkpoint."""
        return next(reversed(self.all()), None)

    def best(self) -> Path | None:
        """Return the checkpoint of the best evaluation, the earlier of equals; None without one."""
        best: tuple[Path, float] | None = None
        if self.keep_best is not None:
            for path in self.all():
                value = (read_state(path)["evaluation"] or {}).get(self.keep_best)
                if value is not None and better(self.keep_best, value, best and best[1]):
                    best = path, value
        return None if best is None else best[0]

    def to_resume(self, resume: bool | str | Path) -> Path | None:
        """Return the checkpoint to go on from, or None to begin; nothing on disk is lost by what follows.

        Raises:
            CheckpointError: There is a run here and ``resume`` is False, or later checkpoints than that to resume.
        """
        latest = self.latest()
        if not resume:
            if latest is not None:
                raise CheckpointError(
                    f"{self.path} holds a run, up to {latest.name}. Write fit(resume=True) to go on with it, or choose "
                    "a new output_dir."
                )
            return None
        if resume is True:
            return latest
        checkpoint = Path(resume)
        read_state(checkpoint)
        if latest is not None and checkpoint.resolve() != latest.resolve():
            raise CheckpointError(
                f"{self.path} holds {latest.name}, which a run from {checkpoint} would contradict. Resume from the "
                "latest, or choose a new output_dir."
            )
        return checkpoint

    def save(self, step: int, accelerator: Accelerator, write: Callable[[Path], None]) -> Path:
        """Have every process ``write`` its part into a new folder, then make that the checkpoint of ``step``.

        Until the renaming at the very end, everything older is left as it is.
        """
        target = self.path / f"step-{step:08d}"
        partial = self.path / (target.name + _PARTIAL)
        if accelerator.is_main_process:
            if target.exists():
                raise CheckpointError(
                    f"{target} exists already. Expected a run that goes on from its latest checkpoint."
                )
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        write(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for file in partial.iterdir():
                _flush(file)
            os.rename(partial, target)
            self._prune()
        accelerator.wait_for_everyone()
        return target

    def clean(self) -> None:
        """Remove what an interrupted save has left."""
        if self.path.is_dir():
            for path in self.path.iterdir():
                if path.name.endswith(_PARTIAL) and _NAME.fullmatch(path.name[: -len(_PARTIAL)]):
                    shutil.rmtree(path)

    def _prune(self) -> None:
        if self.keep_last is None:
            return
        best = self.best() if self.keep_best else None
        for path in self.all()[: -self.keep_last]:
            if path != best:
                # A half-deleted folder must not look like a checkpoint.
                doomed = path.with_name(path.name + _PARTIAL)
                os.rename(path, doomed)
                shutil.rmtree(doomed)


def better(metric: str, value: float, than: float | None) -> bool:
    """Say whether ``value`` of an evaluation metric is better than another, or than none; NaN never is."""
    if than is None:
        return math.isfinite(value)
    return value < than if metric == "loss" else value > than


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the ``state.json`` of a checkpoint.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint} is no checkpoint: expected a folder with a readable state.json, such as "
            f".../checkpoints/step-00000100 ({error})."
        ) from error
    return state


def _flush(file: Path) -> None:
    """Have the operating system write a file to disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
