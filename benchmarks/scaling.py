"""How steps scale with processes: counted and timed on 1 and 2 gloo processes, modelled to 256.

    python benchmarks/scaling.py                      # measure on this machine
    python benchmarks/scaling.py --model              # the model's table alone
    python benchmarks/scaling.py --model --milliseconds 25 --parameters 86.6 --within 150 --between 25

The model: a ring all-reduce sends 2 (R - 1) / R of the gradients' bytes, hidden behind the backward that is the step's
last, and otherwise waited for. In the two-pass step that is the auxiliary backward, k of the batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from step_time import METHODS, build, interleaved
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entprop_wrap as entprop
from entprop_wrap.methods import Vanilla
from tests.helpers.processes import run_processes

#: Step, its time without communication over vanilla's, and the share of vanilla's backward that is its last one.
STEPS = {
    "vanilla": (Vanilla(), 1.0, 1.0),
    "EntProp()": (METHODS["0.2, 1"], 1.24, 0.2),
    "lagged": (METHODS["0.2, 1, lagged"], 1.2, 1.2),
    "lagged, equal budget": (METHODS["0.2, 1, lagged, equal budget"], 1.05, 1.0),
}
BACKWARD = 2 / 3  # of a step's time


def main():
    options = parse()
    if not options.model:
        print(f"{options.net}, {options.size} px, {options.batch} images a process, torch {torch.__version__}\n")
        print("| engine | processes | step | time / vanilla | collectives | MB |\n|---|---|---|---|---|---|")
        for processes in (1, 2):
            for row in run_processes(measure, options, processes=processes)[0]:
                print(f"| {row[0]} | {processes} | {' | '.join(map(str, row[1:]))} |", flush=True)
        print()
    print("\n".join(modelled(options)))


class Traffic(TorchDispatchMode):
    """Counts the collectives inside a with-block, and the bytes that one process puts into them."""

    def __init__(self):
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count a collective."""
        if function.namespace == "c10d" and ("reduce" in function.name() or "gather" in function.name()):
            gathers = "gather" in function.name()  # (output, input); the others change or fill their first argument
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.calls += 1
            self.bytes += max(sizes) if gathers or len(sizes) > 1 else sum(sizes)
        return function(*args, **(kwargs or {}))


def shard(model):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for child in model.children():
        if sum(1 for _ in child.parameters()) > 2:
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def measure(rank, options):
    """Return a row per engine and step: time over vanilla's in the same engine, collectives, megabytes."""
    rows = []
    images, labels = torch.rand(options.batch, 3, options.size, options.size), torch.arange(options.batch) % 100
    for engine, spread in {"DDP": DistributedDataParallel, "FSDP2": shard}.items():
        steps, models, traffic = {}, [], {}
        for name, (method, _, _) in STEPS.items():
            model = spread(entprop.wrap(build(options.net, options)))
            models.append(model)
            steps[name] = lambda model=model, method=method: entprop.training_step(model, images, labels, method=method)
            steps[name]()  # of a lagged step the first, in which nothing comes back
            model.zero_grad()
            with Traffic() as traffic[name]:
                steps[name]()
        times = dict(zip(steps, interleaved(list(steps.values()), models, options), strict=True))
        base = statistics.median(times["vanilla"])
        for name, seen in traffic.items():
            time = f"{statistics.median(times[name]) / base:.2f}"
            rows.append([engine, name, time, seen.calls, f"{seen.bytes / 1e6:.1f}"])
    return rows


def modelled(options):
    """Return the lines of a table: the time of a step, over that of vanilla training on one GPU."""
    size = 4e6 * options.parameters
    counts = (1, 2, 8, 16, 64, 256)
    lines = [
        f"{options.milliseconds:g} ms a step, {options.parameters:g} M parameters, {options.within:g} GB/s within a "
        f"host of 8, {options.between:g} GB/s a GPU between hosts; time of a step over vanilla's on one GPU:\n",
        f"| step | {' | '.join(map(str, counts))} |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for name, (_, compute, last) in STEPS.items():
        cells = []
        for ranks in counts:
            speed = options.within if ranks <= 8 else options.between
            sending = 2 * (ranks - 1) / ranks * size / (1e9 * speed) / (1e-3 * options.milliseconds)
            cells.append(f"{compute + max(0.0, sending - BACKWARD * last):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="print the model's table alone")
    parser.add_argument("--net", default="resnet18", help="timm name of what is measured (default: resnet18)")
    parser.add_argument("--size", type=int, default=64, help="pixels (default: 64)")
    parser.add_argument("--batch", type=int, default=40, help="images a step and process (default: 40)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--milliseconds", type=float, default=60, help="of a modelled vanilla step (default: 60)")
    parser.add_argument("--parameters", type=float, default=25.6, help="millions, modelled (default: 25.6, ResNet-50)")
    parser.add_argument("--within", type=float, default=150, help="GB/s within a host (default: 150)")
    parser.add_argument("--between", type=float, default=12, help="GB/s a GPU between hosts (default: 12)")
    return parser.parse_args(arguments, SimpleNamespace(device="cpu", repeat=1, channels_last=False))


if __name__ == "__main__":
    main()
