"""Everything that needs a GPU to be known, in one run that is meant to take eight minutes, written to RESULTS.md.

    python benchmarks/gpu.py             # on a CUDA device
    python benchmarks/gpu.py --small     # anywhere, on tiny models: a trial of the script, whose figures mean nothing

Steps against plain training and against their bare passes, in turns; kernels, launches and memory; the loops of others;
CUDA graphs; fp16 behind a gradient scaler; DDP and SyncBatchNorm; corruptions. A part that fails is written down as
failed, and the others run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
from corruptions import SEVERITIES, pictures, seconds
from step_time import METHODS, Bench, build, interleaved, ratio, synchronise
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entprop_wrap as entprop
from entprop_wrap import EntProp
from entprop_wrap.methods import Vanilla
from entprop_wrap.robustness.corruptions import CORRUPTIONS, corrupt
from tests.helpers.processes import run_processes

STEPS = {
    "EntProp()": METHODS["0.2, 1"],
    "lagged": METHODS["0.2, 1, lagged"],
    "lagged, equal budget": METHODS["0.2, 1, lagged, equal budget"],
}
GPU = [
    {"name": "resnet50", "size": 224, "batch": 128, "repeat": 2},
    {"name": "resnet18", "size": 32, "batch": 256, "repeat": 10},
    {"name": "vit_small_patch16_224", "size": 224, "batch": 128, "repeat": 2},
]
SMALL = [
    {"name": "test_resnet", "size": 32, "batch": 10, "repeat": 1},
    {"name": "test_vit", "size": 32, "batch": 10, "repeat": 1},
]


def main():
    options = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    began = time.perf_counter()
    common = {"device": options.device, "rounds": options.rounds, "channels_last": True}
    runs = [SimpleNamespace(**common, amp="bf16", **run) for run in (SMALL if options.small else GPU)]
    parts = {
        "Steps": functools.partial(steps, runs),
        "Where the time goes": functools.partial(kernels, runs),
        "The loops of others": functools.partial(peers, runs),
        "CUDA graphs": functools.partial(graphs, runs[-2:][0], options.small),
        "fp16 with a gradient scaler": functools.partial(half_precision, runs[0]),
        "Processes": functools.partial(processes, options.device),
        "Corruptions": functools.partial(corruption_speed, options),
    }
    parts = {title: parts[title] for title in options.parts or parts}
    text = [f"# Measured on {machine(options.device)}\n\n`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`".rstrip()]
    failed: list[str] = []
    for title, part in parts.items():
        start = time.perf_counter()
        try:
            found = part()
        except Exception:  # a GPU is at hand for minutes: the other parts still count
            found, failed = f"Failed:\n\n```\n{traceback.format_exc()}```", [*failed, title]
        text.append(f"## {title}\n\n{found}\n\n{time.perf_counter() - start:.0f} s.")
        print(text[-1], flush=True)
        whole = "\n\n".join([*text, f"Everything took {time.perf_counter() - began:.0f} s."])
        options.output.write_text(whole + "\n")
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


def machine(device):
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    return f"{name}: {versions}" + (f", CUDA {torch.version.cuda}" if device == "cuda" else "")


def table(head, rows):
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def spread(quartiles):
    return "{1:.3f} ({0:.3f} to {2:.3f})".format(*quartiles)


@functools.cache
def bench(name, **options):
    """Return a model and its batch, made once; lagged steps have something to bring back."""
    made = Bench(name, SimpleNamespace(**options))
    for method in STEPS.values():
        made.step(method)()
    return made


def bench_of(run):
    return bench(**vars(run))


def steps(runs):
    """Each step against a vanilla one and against its bare passes, all in turns."""
    rows = []
    for run in runs:
        made = bench_of(run)
        plain = made.memory(made.vanilla, made.plain)
        functions = {"vanilla": made.vanilla}
        for name, method in STEPS.items():
            functions |= {name: made.step(method), f"floor of {name}": made.bare(method)}
        times = dict(zip(functions, made.times(*functions.values()), strict=True))
        for name in ("vanilla", *STEPS):
            middle = statistics.median(times[name])
            against = [spread(ratio(times[name], times["vanilla"]))] if name in STEPS else ["1"]
            against += [spread(ratio(times[name], times[f"floor of {name}"]))] if name in STEPS else ["-"]
            memory = made.memory(functions[name], made.wrapped) / plain if name in STEPS else 1
            speed = f"{run.batch / middle:.0f}"
            rows.append([f"{run.name}, {run.size} px, {run.batch}", name, speed, *against, f"{memory:.3f}"])
    head = ["model, size, batch", "step", "images/s", "time / vanilla (quartiles)", "time / floor", "memory / vanilla"]
    return f"bf16, channels_last, {runs[0].rounds} rounds.\n\n{table(head, rows)}"


def kernels(runs):
    """Launches, and what they take, of one step each; on a CPU, operators."""
    rows = []
    for run in runs:
        made = bench_of(run)
        for name, function in {"vanilla": made.vanilla, **{n: made.step(m) for n, m in STEPS.items()}}.items():
            function()
            synchronise(run.device)
            start = time.perf_counter()
            function()
            synchronise(run.device)
            wall = time.perf_counter() - start
            events, took = profiled(function, run.device)
            busy = sum(map(took, events)) / 1e6
            top = ", ".join(f"{event.key[:40]} {took(event) / 1e3:.1f} ms" for event in events[:3])
            launches = sum(event.count for event in events)
            rows.append([run.name, name, launches, f"{1e3 * busy:.1f}", f"{1e3 * wall:.1f}", f"`{top}`"])
    return table(["model", "step", "launches", "busy, ms", "wall, ms", "the three longest"], rows)


def profiled(function, device):
    """Return the kernels of a call, longest first, and what gives the microseconds of one."""
    cuda = device == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if cuda else [kinds.CPU]) as profile:
        function()
        synchronise(device)
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == kind]

    def took(event):
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    return sorted(events, key=took, reverse=True), took


def peers(runs):
    """What others write, with ours of the same work."""
    rows = [row for run in runs for row in bench_of(run).peers()]
    return table(["model", "loop", "passes", "time / vanilla", "ours / loop (quartiles)"], rows)


def graphs(run, small):
    """``torch.compile(mode="reduce-overhead")`` with a fixed k|B|: plain and lagged steps, both compiled."""
    made = bench_of(run)
    how = {"backend": "eager"} if small else {"mode": "reduce-overhead"}
    functions = []
    for method in (Vanilla(), STEPS["lagged"], STEPS["lagged, equal budget"]):
        model = torch.compile(entprop.wrap(build(run.name, run)), **how)
        functions.append(made.step(method, model))
        for _ in range(4):  # compiles, records, warms up
            functions[-1]()
    times = interleaved(functions, [], run)
    rows = [[n, spread(ratio(t, times[0]))] for n, t in zip(("lagged", "equal budget"), times[1:], strict=True)]
    return f"{run.name}, {run.size} px, {how}\n\n" + table(["step", "time / compiled vanilla (quartiles)"], rows)


def half_precision(run):
    """Gradients of a second step in fp16 against fp32; those of another scale should be equal bit for bit.

    Of the same images: rounding changes which of nearly equal entropies are the highest.
    """
    made, rows = bench_of(run), []
    ours = {name: replace(method, mix=None, uncertainty=first_images) for name, method in STEPS.items()}
    methods = {"vanilla": Vanilla(), **ours}
    for name, method in methods.items():
        exact, half, again = (gradient(made, method, scale) for scale in (None, 2.0**10, 2.0**12))
        rows.append([name, f"{distance(half, exact):.2e}", f"{distance(again, half):.1e}"])
    return table(["step", "distance to fp32, relative", "between two scales"], rows)


def first_images(logits, labels):
    return -torch.arange(len(logits), device=logits.device, dtype=torch.float32)


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def gradient(made, method, scale):
    """Return the gradient after a second step, flat; with a scale, in fp16."""
    model = copy.deepcopy(made.wrapped)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    device = made.images.device.type
    scaler = torch.amp.GradScaler(device, init_scale=scale or 1.0, enabled=scale is not None)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16, enabled=scale is not None):
            entprop.training_step(
                model, made.images, made.labels, method=method, backward=lambda loss: scaler.scale(loss).backward()
            )
    scaler.unscale_(optimizer)
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def processes(device):
    """Two gloo processes on this device, each with half of the batch, against one with all of it, in float64."""
    methods = {name: EntProp(fraction=1.0, mix=None, lagged=name == "lagged") for name in ("two passes", "lagged")}
    expected = {name: two_steps(method, device, slice(None)) for name, method in methods.items()}
    rows = [[name, *found] for name, *found in run_processes(half_of_a_batch, methods, expected, device)[0]]
    norms = "SyncBatchNorm" if device == "cuda" else "GroupNorm: SyncBatchNorm needs an accelerator"
    one = ""
    if device == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            torch.distributed.init_process_group("nccl", f"file://{folder}/store", rank=0, world_size=1)
            far = distance(two_steps(methods["lagged"], device, slice(None), True), expected["lagged"])
            torch.distributed.destroy_process_group()
        one = f"\n\nOne NCCL process in DDP, lagged: {far:.1e}."
    return f"DDP, {norms}.\n\n" + table(["step", "distance to one process, relative"], rows) + one


def half_of_a_batch(rank, methods, expected, device):
    share = slice(8 * rank, 8 * rank + 8)
    return [(n, f"{distance(two_steps(m, device, share, True), expected[n]):.1e}") for n, m in methods.items()]


def two_steps(method, device, share, parallel=False):
    """Return the gradient of a second step on a share of 16 images, flat, on the CPU."""
    torch.manual_seed(0)
    first = nn.BatchNorm2d(8) if device == "cuda" else nn.GroupNorm(2, 8)
    last = nn.BatchNorm2d(8) if device == "cuda" else nn.GroupNorm(2, 8)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), first, nn.SiLU(), nn.Conv2d(8, 8, 3), last, nn.SiLU(), nn.Flatten(1), nn.LazyLinear(5)
    )
    images, labels = torch.rand(16, 3, 8, 8).double().to(device), torch.randint(5, (16,)).to(device)
    net = net.double().to(device)
    net(images)  # gives the lazy layer its shape
    if parallel and device == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    model = entprop.wrap(net)
    call = DistributedDataParallel(model) if parallel else model
    for _ in range(2):
        model.zero_grad()
        entprop.training_step(call, images[share], labels[share], method=method)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu()


def corruption_speed(options):
    """The time that an image takes through all fifteen corruptions at all severities."""
    rows, device = [], torch.device(options.device)
    for size, batch in ((32, 10),) if options.small else ((32, 1024), (224, 128)):
        images, took = pictures(batch, size).to(device), {}
        for name in CORRUPTIONS:
            corrupt(images, name, 3)  # fills the caches of kernels
            calls = [functools.partial(corrupt, images, name, severity) for severity in SEVERITIES]
            took[name] = sum(seconds(call, device) for call in calls)
        slowest = max(took, key=took.get)
        rows.append([size, batch, f"{batch / sum(took.values()):.1f}", f"{slowest}, {5 * batch / took[slowest]:.0f}"])
    return table(["px", "batch", "images/s, whole suite", "slowest, images/s"], rows)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models, on the CPU unless --device says otherwise")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda, and cpu with --small)")
    parser.add_argument("--parts", nargs="+", help="titles of the parts to run (default: all)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 15; 2 with --small)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("RESULTS.md"))
    options = parser.parse_args()
    options.device = options.device or ("cpu" if options.small else "cuda")
    options.rounds = options.rounds or (2 if options.small else 15)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --small is a trial without one")
    return options


if __name__ == "__main__":
    main()
