"""Files that are whole or not there, on one process or several, and errors that say what stood in the way."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from entprop_wrap.errors import CheckpointError, ConfigurationError, EntPropError

T = TypeVar("T")

#: Seconds to wait for a lock: loading processes of a killed run notice its end, and give it up, after five.
PATIENCE = 10.0


def flush(file: Path) -> None:
    """Have the operating system write a file to disk; Windows does so only for a descriptor that may write."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def flush_folder(folder: Path) -> None:
    """Have the operating system write a folder's list of files to disk; Windows does so by itself."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a path to write to; after the with-block ``file`` is that, whole, or if the process is killed as it was."""
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)  # after an error


@contextmanager
def explaining_failed_writes(target: Path) -> Iterator[None]:
    """Raise :class:`CheckpointError` where what is written inside the with-block cannot be."""
    try:
        yield
    except EntPropError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        folder = next(path for path in (target, *target.absolute().parents) if path.exists())
        free = shutil.disk_usage(folder).free / 1e9
        raise CheckpointError(
            f"{target} cannot be written ({error}); {free:.3g} GB are free there. What was saved before is whole: make "
            "room, then fit(resume=True)."
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder inside the with-block; the lock of a killed process is void.

    Raises:
        CheckpointError: Another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"Another run is at work in {folder}. Wait, or choose another output_dir.") from error
    try:
        yield
    finally:
        lock.release()


def check_writable(folder: Path) -> None:
    """Raise :class:`ConfigurationError` unless files can be written to ``folder``; leave nothing behind."""
    missing: list[Path] = []
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"output_dir={str(folder)!r} cannot be written to ({error}).") from error
    finally:
        for path in missing:
            if path.is_dir():
                path.rmdir()


def together(function: Callable[[], T]) -> T:
    """Return what ``function()`` returns; an error on one process is raised on all, so that none waits for another."""
    failed: Exception | None = None
    try:
        value = function()
    except Exception as error:
        failed = error
    for problem in (failed, *gather_object([_sendable(failed)])):
        if problem is not None:
            raise problem
    return value


def _sendable(error: Exception | None) -> Exception | None:
    """Return an error as other processes can read it: some cannot be pickled, or not be made anew."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Return, or raise, on all processes what ``function()`` does on the main process."""
    value = together(lambda: function() if accelerator.is_main_process else None)
    return broadcast_object_list([value])[0]  # type: ignore[no-any-return]
