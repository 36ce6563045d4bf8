"""A table of finished runs in a file of JSON lines, so that a sweep that was stopped continues where it was.

    table = RunTable("outputs/runs.jsonl")
    for seed in range(5):
        if table.find(settings, seed) is None:
            table.add(settings, seed, train(settings, seed))

A row belongs to its settings and its seed: change a setting, and it is another row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from entprop_wrap.trainer.run_identity import describe


class RunTable:
    """Results by settings and seed.

    Each row is one line, appended by a single write once its run is over; nothing is ever rewritten. A line that was
    cut off, by a full disk say, is left out with a warning, and its run is done again.

    Args:
        path: The file; it and its folder are made when there is a first row.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._rows: dict[str, dict[str, Any]] = {}
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self._rows[key_of(row["settings"], row["seed"])] = row
            except (ValueError, KeyError, TypeError):
                warnings.warn(f"{self.path}, line {number} is damaged: its run counts as not done.", stacklevel=2)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows.values())

    def find(self, settings: Mapping[str, Any], seed: int) -> dict[str, Any] | None:
        """Return the result of a run, or None if it is still to be done."""
        row = self._rows.get(key_of(settings, seed))
        return None if row is None else row["result"]

    def add(self, settings: Mapping[str, Any], seed: int, result: Mapping[str, Any]) -> None:
        """Append a row, on disk when this returns. A second result of a run takes the place of the first."""
        row = {"settings": plain(settings), "seed": seed, "result": plain(result)}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            os.lseek(handle, max(0, size - 1), os.SEEK_SET)
            if size and os.read(handle, 1) != b"\n":
                line = b"\n" + line  # the last line is damaged: do not lengthen it
            written = os.write(handle, line)
            if written != len(line):
                raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written. Is the disk full?")
            os.fsync(handle)
        finally:
            os.close(handle)
        self._rows[key_of(settings, seed)] = row


def key_of(settings: Mapping[str, Any], seed: int) -> str:
    """Return a hash of settings and seed that is the same in every process."""
    text = json.dumps([plain(settings), seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """Return ``value`` in types that JSON knows; of a dataclass, its class and all its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.compare}
        return {"class": type(value).__qualname__, **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return describe(value)
