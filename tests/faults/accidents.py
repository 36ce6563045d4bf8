"""Damage to checkpoints, and kills at random moments: little in the tests here, much in benchmarks/soak.py."""

from __future__ import annotations

import json
import random
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import entprop_wrap as entprop
from entprop_wrap.errors import CheckpointError
from tests.helpers.processes import context
from tests.helpers.trainer_toys import Images
from tests.helpers.trainers import trainer

torch.set_num_threads(1)


def run(folder, epochs=3):
    """Return a Trainer of 2 steps an epoch with all that is random or has memory, saved after every step."""
    method = entprop.EntProp(fraction=0.4, lagged=True)  # whose images wait between steps
    options = {"epochs": epochs, "batch_size": 20, "ema_decay": 0.8, "log_every": 3, "save_every_steps": 1}
    return trainer(folder, data=Images(augment=True), method=method, keep_last=3, **options)


# Damage ---------------------------------------------------------------------------------------------------------------


def flip_bit(content: bytearray, draws: random.Random) -> None:
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)


def clear_half(content: bytearray, draws: random.Random) -> None:
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)


def truncate(content: bytearray, draws: random.Random) -> None:
    del content[draws.randrange(1, len(content)) :]


def empty(content: bytearray, draws: random.Random) -> None:
    content.clear()


DAMAGES = {"bit flip": flip_bit, "zeros": clear_half, "truncated": truncate, "empty": empty, "missing": None}


def damaged(folder: Path, draws: random.Random) -> Iterator[tuple[str, str]]:
    """Damage each file of the latest checkpoint in each way; whole again afterwards."""
    latest = max((folder / "checkpoints").glob("step-????????"))
    for file in sorted(latest.iterdir()):
        content = file.read_bytes()
        for name, damage in DAMAGES.items():
            if damage is None:
                file.unlink()
            else:
                changed = bytearray(content)
                damage(changed, draws)
                file.write_bytes(changed)
            yield file.name, name
            file.write_bytes(content)


def outcome(resume: Callable[[], object]) -> str:
    """Return "fallback" (with a warning), "error" (a CheckpointError), or "silent"."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            resume()
        except CheckpointError:
            return "error"
    return "fallback" if any("Passing over" in str(warning.message) for warning in caught) else "silent"


# Kills ----------------------------------------------------------------------------------------------------------------


def train(folder: Path, epochs: int) -> None:
    """Train to the end, from wherever the run stands."""
    run(folder, epochs).fit(resume=True)


def storm(folder: Path, kills: int, draws: random.Random, epochs: int = 3) -> Counter[str]:
    """Train in processes that are killed at random moments, ``kills`` times, and then once more.

    Returns:
        How many were "killed", and how many had come to the "end" before; then the folder is made anew.
    """
    # Forked from a process that has imported everything and run nothing: the moment falls into the run itself.
    forked = context()
    _wait(forked.Process(target=int))  # which starts that process
    began = time.monotonic()
    _wait(forked.Process(target=train, args=(folder, epochs)))
    seconds = time.monotonic() - began
    shutil.rmtree(folder)
    counts: Counter[str] = Counter()
    while counts["killed"] < kills:
        process = forked.Process(target=train, args=(folder, epochs))
        process.start()
        process.join(draws.uniform(0, seconds))
        process.kill()
        process.join()
        over = process.exitcode == 0
        counts["ended" if over else "killed"] += 1
        if over:
            shutil.rmtree(folder)
        elif process.exitcode != -9:
            raise AssertionError(f"A resumed run failed with exit code {process.exitcode}, after {dict(counts)}.")
    _wait(forked.Process(target=train, args=(folder, epochs)))
    return counts


def _wait(process: Any) -> None:
    process.start()
    process.join()
    assert process.exitcode == 0


def contents(checkpoint: Path) -> dict[str, Any]:
    """Return what is in each file of a checkpoint."""
    read = {
        ".safetensors": load_file,
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".json": lambda path: json.loads(path.read_text()),
    }
    found = {path.name: read[path.suffix](path) for path in checkpoint.iterdir()}
    for key in ("files", "sha256"):  # of pickles, whose bytes may differ
        del found["state.json"][key]
    return found


def differences(folder: Path, other: Path) -> list[str]:
    """Return in what two runs that came to their end differ: checkpoints, metrics and exported models."""
    found = []
    for checkpoint in sorted(folder.glob("checkpoints/step-????????")):
        same = other / "checkpoints" / checkpoint.name
        if not same.exists() or not equal(contents(checkpoint), contents(same)):
            found.append(checkpoint.name)
    models = [load_file(run / "model/model.safetensors") for run in (folder, other)]
    found += [] if equal(*models) else ["model.safetensors"]
    return found + ([] if lines(folder) == lines(other) else ["metrics.jsonl"])


def lines(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, or those of a ``kind``, without what depends on the clock."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = [line for line in found if kind in (None, line["kind"])]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in kept]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)
