"""Checkpoint folders: written whole or not at all, kept by age and by score, and found again.

checkpoints/step-00000123/
    model.safetensors          the model's own weights, under its own keys
    auxiliary.safetensors      the auxiliary copies, where there are any
    ema.safetensors, ema_auxiliary.safetensors    the same of the moving average
    optimizer.pt               states of optimizer, schedule and gradient scaler
    process-00000.pt           random states and running averages, for each process
    lagged-00000.safetensors   what waits for the next step of EntProp(lagged=True), for each process; absent otherwise
    state.json                 where the run stood, its last evaluation, its options, and checksums of all files
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entprop_wrap.errors import CheckpointError
from entprop_wrap.utils.files import explaining_failed_writes, flush, flush_folder, on_main, replacing, sha256, together

if TYPE_CHECKING:
    from entprop_wrap.trainer.run_state import RunState

_NAME = re.compile(r"step-\d{8,}")
_PARTIAL, _DAMAGED = ".partial", ".damaged"


class CheckpointFolder:
    """The checkpoints of one run: the latest (None: all), and that of the best evaluation by a metric (None: none)."""

    def __init__(self, path: Path, keep_last: int | None, keep_best: str | None) -> None:
        self.path, self.keep_last, self.keep_best = path, keep_last, keep_best
        self.proved = False  # that a checkpoint of this run can be read

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first. Renaming is atomic, so what bears the name is complete."""
        return sorted((path for path in self.path.glob("step-*") if _NAME.fullmatch(path.name)), key=_step)

    def latest(self) -> Path | None:
        """Return the latest checkpoint."""
        return next(reversed(self.all()), None)

    def best(self) -> Path | None:
        """Return the checkpoint of the best evaluation, the earlier of equals; None without one."""
        best, highest = None, None
        for path in self.all() if self.keep_best is not None else []:
            with suppress(CheckpointError):
                value = (read_state(path)["evaluation"] or {}).get(self.keep_best)
                if value is not None and better(str(self.keep_best), value, highest):
                    best, highest = path, value
        return best

    def to_resume(self, resume: bool | str | Path) -> Path | None:
        """Return the checkpoint to continue from, or None to begin; nothing on disk is lost by what follows.

        Raises:
            CheckpointError: There is a run here and ``resume`` is False, or sound checkpoints after that to resume;
                or the checkpoint, or every one there is, is damaged.
        """
        found = self.all()
        if resume is True:
            for path in reversed(found):
                if (damage := damage_of(path)) is None:
                    return path
                warnings.warn(f"Passing over a checkpoint. {damage}", stacklevel=2)
            if found:
                raise CheckpointError(f"All {len(found)} checkpoints in {self.path} are damaged.")
            return None
        if not resume:
            if found:
                raise CheckpointError(
                    f"{self.path} holds a run, up to {found[-1].name}. Write fit(resume=True) to continue it, or "
                    "choose a new output_dir."
                )
            return None
        checkpoint = Path(resume)
        if damage := damage_of(checkpoint):
            raise damage
        names = [path.resolve() for path in found]
        later = found[names.index(checkpoint.resolve()) + 1 :] if checkpoint.resolve() in names else found
        if sound := [path for path in later if damage_of(path) is None]:
            raise CheckpointError(
                f"{self.path} holds {sound[-1].name}, which a run from {checkpoint} would contradict. Resume from the "
                "latest, or choose a new output_dir."
            )
        return checkpoint

    def save(self, state: RunState) -> Path:
        """Make a checkpoint of ``state``, of which every process writes its part; call it on all.

        Until the renaming at the very end, everything older is left as it is. The first one is read back, or raises.
        """
        target = self.path / f"step-{state.position.step:08d}"
        partial = self.path / (target.name + _PARTIAL)

        def begin() -> None:
            if target.exists():
                raise CheckpointError(f"{target} exists already. Expected a run that continues from its latest.")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def finish() -> None:
            files = {file.name: sha256(file) for file in sorted(partial.iterdir())}
            self._write_state(partial, state, files)

        def publish() -> None:
            for file in partial.iterdir():
                flush(file)
            flush_folder(partial)
            os.rename(partial, target)
            flush_folder(self.path)

        try:
            with explaining_failed_writes(target):
                on_main(state.accelerator, begin)
                together(lambda: state.write(partial))
                on_main(state.accelerator, finish)
                if not self.proved:
                    together(lambda: state.read(partial))
                on_main(state.accelerator, publish)
        except Exception:
            if state.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.proved = True
        return target

    def note(self, state: RunState) -> bool:
        """Write the evaluation of ``state`` into its checkpoint, and return whether there is one."""
        folder = self.path / f"step-{state.position.step:08d}"
        if not folder.exists():
            return False
        with explaining_failed_writes(folder):
            self._write_state(folder, state, read_state(folder)["files"])
            flush_folder(folder)
        return True

    def clean(self, step: int) -> None:
        """Remove what an interrupted save has left; put aside checkpoints of later than ``step``, which are damaged."""
        for path in self.path.glob(f"step-*{_PARTIAL}"):
            shutil.rmtree(path)
        for path in self.all():
            if _step(path) > step:
                aside = path.with_name(path.name + _DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)

    def prune(self) -> None:
        """Remove checkpoints that are neither among the latest nor the best."""
        if self.keep_last is None:
            return
        best = self.best()
        for path in self.all()[: -self.keep_last]:
            if path != best:
                # A half-deleted folder must not look like a checkpoint.
                doomed = path.with_name(path.name + _PARTIAL)
                try:
                    os.rename(path, doomed)
                    shutil.rmtree(doomed)
                except OSError as error:
                    warnings.warn(f"An old checkpoint cannot be removed ({error}).", stacklevel=2)

    @staticmethod
    def _write_state(folder: Path, state: RunState, files: dict[str, str]) -> None:
        content = {**asdict(state.position), "run": state.identity, "files": files}
        content["sha256"] = _digest(content)
        with replacing(folder / "state.json") as partial:
            partial.write_text(_text(content), encoding="utf-8")


def better(metric: str, value: float, than: float | None) -> bool:
    """Return whether ``value`` of an evaluation metric is better than another, or than none; NaN never is."""
    if than is None:
        return math.isfinite(value)
    return value < than if metric == "loss" else value > than


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the ``state.json`` of a checkpoint, or raise :class:`CheckpointError`."""
    try:
        text = (checkpoint / "state.json").read_text(encoding="utf-8")
        state: dict[str, Any] = json.loads(text)
        damaged = text != _text(state) or state.pop("sha256") != _digest(state)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint: expected a folder with a readable state.json, such as "
            f".../checkpoints/step-00000100 ({error})."
        ) from error
    if damaged:
        raise CheckpointError(f"{checkpoint / 'state.json'} is damaged: its content does not have its checksum.")
    return state


def damage_of(checkpoint: Path) -> CheckpointError | None:
    """Return what is wrong with a checkpoint, or None where all its files are as they were written."""
    try:
        for name, digest in read_state(checkpoint)["files"].items():
            if sha256(checkpoint / name) != digest:
                return CheckpointError(f"{checkpoint / name} is damaged: its content does not have its checksum.")
    except OSError as error:
        return CheckpointError(f"A file of {checkpoint} cannot be read: the checkpoint is incomplete ({error}).")
    except CheckpointError as error:
        return error
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _text(state: dict[str, Any]) -> str:
    return json.dumps(state, indent=2) + "\n"


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(_text(state).encode()).hexdigest()
