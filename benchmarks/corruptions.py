"""Speed of the corruptions next to the plain per-image code of tests/reference/corruptions.py, in one run.

    python benchmarks/corruptions.py --sizes 32 64 96 224 --batch 32 --device cpu

Prints images/s of each corruption at all five severities together, and of the whole suite: the time to take one image
through every corruption of ImageNet-C at every severity. Both codes keep the pictures of frost that they crop from,
where the released code reads a file for each image. Calls of both alternate, and times are the best of ``--repeats``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from entprop_wrap.robustness.corruptions import CORRUPTIONS, corrupt
from tests.reference.corruptions import REFERENCES

SEVERITIES = (1, 2, 3, 4, 5)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of ``call``: of this process alone on a CPU, so that other work there does not count; else wall time.

    One thread works, and nothing waits, so on an idle CPU the two are the same.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def compare(name: str, single: np.ndarray, batched: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Mean time per image over the severities: of the reference, and of the batched code."""
    slow_total = fast_total = 0.0
    for severity in SEVERITIES:
        slow = fast = float("inf")
        corrupt(batched, name, severity)  # fills the caches of kernels, and draws the frost
        for _ in range(repeats):
            fast = min(fast, seconds(lambda: corrupt(batched, name, severity), batched.device))  # noqa: B023
            rng = np.random.default_rng(0)
            plain = lambda: REFERENCES[name](single, severity, rng)  # noqa: B023, E731
            slow = min(slow, seconds(plain, torch.device("cpu")))
        slow_total, fast_total = slow_total + slow, fast_total + fast / len(batched)
    return slow_total / len(SEVERITIES), fast_total / len(SEVERITIES)


def pictures(count: int, size: int) -> torch.Tensor:
    """Smooth random colours with some texture, ``(count, 3, size, size)`` in [0, 1]: brightness as in photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (smooth + 0.1 * torch.randn(count, 3, size, size, generator=generator)).clamp(0.0, 1.0)


def run(size: int, batch: int, repeats: int, device: torch.device) -> None:
    images = pictures(batch, size)
    single = images[0].double().numpy()
    batched = images.to(device)
    print(f"\n{size} px, batch {batch} on {device}, one thread; images/s")
    print(f"{'corruption':<20}{'reference':>12}{'batched':>12}{'ratio':>9}")
    slow_total = fast_total = 0.0
    for name in CORRUPTIONS:
        slow, fast = compare(name, single, batched, repeats)
        print(f"{name:<20}{1 / slow:>12.1f}{1 / fast:>12.1f}{slow / fast:>8.1f}x")
        slow_total, fast_total = slow_total + slow * len(SEVERITIES), fast_total + fast * len(SEVERITIES)
    print(f"{'whole suite':<20}{1 / slow_total:>12.2f}{1 / fast_total:>12.2f}{slow_total / fast_total:>8.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 64, 96, 224], help="sides of the images, in pixels"
    )
    parser.add_argument("--batch", type=int, default=32, help="images per call of the batched code")
    parser.add_argument("--repeats", type=int, default=3, help="the best of how many calls counts")
    parser.add_argument("--device", default="cpu", help="where the batched code runs; the reference is on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in options.sizes:
        run(size, options.batch, options.repeats, torch.device(options.device))


if __name__ == "__main__":
    main()
