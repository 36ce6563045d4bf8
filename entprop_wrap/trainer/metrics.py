"""The metrics of training: averages over steps, and the file that they and the evaluations are written to."""

from __future__ import annotations

import json
from operator import add
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.utils.files import explaining_failed_writes, replacing


class Meter:
    """Averages over the batches between two log lines. Adding waits for nothing; reading waits for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # of each value over the batches that have it, and their number
        self.batches = 0
        self.passes = 0.0
        self.last: StepOutput | None = None

    def add(self, output: StepOutput) -> None:
        """Add one batch. A loss that is not finite is counted, and left out of the sums."""
        finite = torch.isfinite(output.loss)
        for name, value in output.scalars().items():
            pair = torch.stack([torch.where(finite, value.float(), 0.0), finite.float()])
            self.sums[name] = pair if name not in self.sums else self.sums[name] + pair
        self.batches += 1
        self.passes += float(output.passes)  # a method's own may be NumPy's, which no checkpoint holds
        self.last = output

    def read(self) -> tuple[dict[str, float], int, int]:
        """Return the means over batches and processes, and how many batches had a finite loss, of how many.

        What the device has found wrong with images or labels since the last call is raised here.
        """
        if self.last is not None and self.last.checker is not None:
            self.last.checker.raise_pending()
        mine = dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist(), strict=True))
        mine["passes"] = [self.passes, self.batches]
        sums: dict[str, list[float]] = {}
        for found in gather_object([mine]):  # a process may have values that others do not have, as lagged steps do
            for name, pair in found.items():
                sums[name] = list(map(add, sums.get(name, (0.0, 0)), pair))
        means = {name: total / max(number, 1) for name, (total, number) in sums.items()}
        return means, int(sums["loss"][1]), int(sums["passes"][1])

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes, so that a resumed run logs the same averages."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return {"sums": sums, "batches": self.batches, "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from a saved state."""
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.batches, self.passes, self.last = state["batches"], state["passes"], None


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, each with "kind" ("train" or "eval"), "step" and "epoch"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with explaining_failed_writes(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def cut(self, step: int, evaluated: bool) -> None:
        """Drop what a run resumed at ``step`` (``evaluated`` or not) writes again, and a line that was cut short."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                content = json.loads(line)
                if (content["step"], content["kind"] == "eval" and not evaluated) <= (step, False):
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        with explaining_failed_writes(self.path), replacing(self.path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
