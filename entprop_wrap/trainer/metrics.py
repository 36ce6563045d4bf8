"""The metrics of training: averages over steps, and the file that they and the evaluations are written to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from entprop_wrap.functional.uncertainty import entropy
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.utils.files import writing

__all__ = ["Meter", "MetricsFile"]


class Meter:
    """Averages over the batches between two log lines. Adding waits for nothing; reading waits for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.finite: Tensor | None = None
        self.batches = 0
        self.images = 0
        self.passes = 0.0
        self.last: StepOutput | None = None

    def add(self, output: StepOutput, images: int) -> None:
        """Add one batch. A loss that is not finite is counted, and left out of the sums."""
        values = {"loss": output.loss, "main_loss": output.main_loss, "main_entropy": output.entropy.mean()}
        if output.aux_loss is not None and output.aux_logits is not None:
            values["aux_loss"] = output.aux_loss
            values["aux_entropy"] = entropy(output.aux_logits).mean()
        finite = torch.isfinite(output.loss)
        for name, value in values.items():
            value = torch.where(finite, value.float(), 0.0)
            self.sums[name] = value if name not in self.sums else self.sums[name] + value
        self.finite = finite.float() if self.finite is None else self.finite + finite
        self.batches += 1
        self.images += images
        self.passes += output.passes
        self.last = output

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], int, int]:
        """Return the means over batches and processes, and how many batches had a finite loss, of how many.

        What the device has found wrong with images or labels since the last call is raised here.
        """
        if self.last is not None and self.last.checker is not None:
            self.last.checker.raise_pending()
        assert self.finite is not None
        local = torch.stack([*self.sums.values(), self.finite, torch.full_like(self.finite, self.batches)])
        *sums, finite, batches = accelerator.reduce(local, reduction="sum").tolist()  # type: ignore[union-attr]
        means = {name: total / max(finite, 1) for name, total in zip(self.sums, sums, strict=True)}
        return {**means, "passes": self.passes / self.batches}, int(finite), int(batches)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes, so that a resumed run logs the same averages."""
        return {
            "sums": {name: value.cpu() for name, value in self.sums.items()},
            "finite": None if self.finite is None else self.finite.cpu(),
            "counts": (self.batches, self.images, self.passes),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from a saved state."""
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.finite = None if state["finite"] is None else state["finite"].to(device)
        self.batches, self.images, self.passes = state["counts"]
        self.last = None


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, each with "kind" ("train" or "eval"), "step" and "epoch"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with writing(self.path):
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
        partial = self.path.with_suffix(".partial")
        with writing(self.path):
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, self.path)
