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
from tests.helpers.trainer_toys import BatchNormNet, Images, make

torch.set_num_threads(1)


def run(folder, epochs=3):
    """Return a Trainer of 2 steps an epoch with all that is random or has memory, saved after every step."""
    config = entprop.TrainerConfig(
        epochs=epochs,
        batch_size=20,
        ema_decay=0.8,
        output_dir=folder,
        log_every=3,
        save_every_steps=1,
        keep_last=3,
        progress=False,
    )
    method = entprop.EntProp(fraction=0.4, lagged=True)  # whose images wait between steps
    return entprop.Trainer(make(BatchNormNet), Images(augment=True), Images(seed=1), method=method, config=config)


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


def differences(folder: Path, other: Path) -> list[str]:
    """Return the files in which two runs that came to their end differ: checkpoints, metrics and exported models."""
    found = []
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("checkpoints/step-????????/*"))
    for name in [*names, "model/model.safetensors"]:
        read = load_file if name.endswith(".safetensors") else _read
        if not (other / name).exists() or not equal(read(folder / name), read(other / name)):
            found.append(name)
    return found + ([] if lines(folder) == lines(other) else ["metrics.jsonl"])


def _read(path: Path) -> Any:
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in ("files", "sha256")}


def lines(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)
