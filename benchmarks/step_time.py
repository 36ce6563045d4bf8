"""How much time and memory an EntProp step takes, against the least it could take.

    python benchmarks/step_time.py                                        # a CNN and a ViT on the CPU
    python benchmarks/step_time.py --models resnet50 --size 224 --batch 256 --device cuda --amp bf16 --channels-last

The floor is the same passes written bare on the plain model: one pass of the batch with the gradient of the images,
n - 1 pixel-gradient passes of k|B| images, one training pass of k|B| images; no mixing, selection, checks or switching.
Of the lagged step it is one pass of as many images, without a gradient of the images.
Everything is timed in one run, interleaved, and compared pair by pair, so that the machine's moods cancel. The formula
is the paper's count of passes, 1 + k n, which is not time: a pass of few images costs more than its share.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from contextlib import nullcontext

import timm
import torch
import torch.nn.functional as F
from tqdm import tqdm

import entprop_wrap as entprop
from entprop_wrap import EntProp
from entprop_wrap.functional.uncertainty import num_selected
from entprop_wrap.methods import Vanilla

METHODS = {
    "0.2, 1": EntProp(),
    "0.6, 1": EntProp(fraction=0.6),
    "0.2, 5": EntProp(attack_steps=5),
    "0.6, 5": EntProp(fraction=0.6, attack_steps=5),
    "0.2, 1, lagged": EntProp(lagged=True),
    "0.2, 1, lagged, equal budget": EntProp(lagged=True, equal_budget=True),
}


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.device}, batch {options.batch}, {options.size} px, {options.amp}")
    print("\n| model | k, n | step / floor (quartiles) | step / vanilla | passes | floor ms | peak memory / vanilla |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        bench_model(name, options)
    wrapping_time()


def bench_model(name, options):
    plain = build(name, options)
    images = torch.rand(options.batch, 3, options.size, options.size, device=options.device)
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (options.batch,), device=options.device)
    wrapped = entprop.wrap(copy.deepcopy(plain))
    amp = torch.autocast(options.device, torch.bfloat16) if options.amp == "bf16" else nullcontext()

    def vanilla():
        with amp:
            entprop.training_step(plain, images, labels, method=Vanilla())

    vanilla_memory = peak_memory(vanilla, plain, options.device)
    for setting, method in METHODS.items():

        def step(method=method):
            with amp:
                entprop.training_step(wrapped, images, labels, method=method)

        def bare(method=method):
            with amp:
                floor(plain, images, labels, method)

        entprop.training_step(wrapped, images, labels, method=method)  # of a lagged method, nothing comes back in it
        passes = entprop.training_step(wrapped, images, labels, method=method).passes
        times = interleaved([bare, step, vanilla], [plain, wrapped], options)
        against_floor = [b / a for a, b in zip(times[0], times[1], strict=True)]
        against_vanilla = statistics.median(b / c for b, c in zip(times[1], times[2], strict=True))
        low, middle, high = statistics.quantiles(against_floor, n=4)
        memory = peak_memory(step, wrapped, options.device) / vanilla_memory
        print(
            f"| {name} | {setting} | {middle:.3f} ({low:.3f} to {high:.3f}) | {against_vanilla:.2f} | "
            f"{passes:.1f} | {1e3 * statistics.median(times[0]):.0f} | {memory:.2f} |",
            flush=True,
        )
    inference(plain, images, options)


def floor(model, images, labels, method):
    """Run the passes of an EntProp step, and nothing else."""
    number = num_selected(len(images), method.fraction)
    if method.lagged:
        rows = range(len(images) + (0 if method.equal_budget else number))
        rows = torch.tensor([row % len(images) for row in rows], device=images.device)
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        return
    leaf = images.detach().requires_grad_()
    F.cross_entropy(model(leaf), labels).backward()
    part, part_labels = images[:number], labels[:number]
    for _ in range(method.attack_steps - 1):
        leaf = part.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(leaf), part_labels), leaf)
    F.cross_entropy(model(part), part_labels).backward()


def interleaved(functions, models, options):
    """Return the seconds of each function, one list per function, paired by round."""
    times = [[] for _ in functions]
    for round_ in tqdm(range(options.rounds + 1), leave=False, disable=None):
        # Whoever goes first in a round finds other caches: take turns.
        order = list(range(len(functions)))[:: 1 if round_ % 2 else -1]
        for index in order:
            for model in models:
                model.zero_grad(set_to_none=True)
            synchronise(options.device)
            start = time.perf_counter()
            for _ in range(options.repeat):
                functions[index]()
            synchronise(options.device)
            if round_:
                times[index].append((time.perf_counter() - start) / options.repeat)
    return times


def peak_memory(function, model, device):
    """Return the bytes that tensors take at most during ``function`` (on the CPU: as its allocator reports them)."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    current = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            most = max(most, current)
    return held + most


def inference(plain, images, options):
    """Compare a model that was wrapped and unwrapped with one that never was."""
    plain.eval()
    returned = entprop.unwrap(entprop.wrap(copy.deepcopy(plain)))
    with torch.no_grad():
        equal = torch.equal(returned(images), plain(images))
        times = interleaved([lambda: plain(images), lambda: returned(images)], [], options)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    print(f"| {type(plain).__name__} inference after unwrap: {ratio:.3f} of plain, equal: {equal} | | | | | | |")


def wrapping_time(norms=300):
    """Print how long it takes to wrap a model of many norms."""
    seconds = []
    for _ in range(7):
        model = torch.nn.Sequential(*(torch.nn.BatchNorm2d(256) for _ in range(norms)))
        start = time.perf_counter()
        entprop.wrap(model)
        seconds.append(time.perf_counter() - start)
    print(f"\nwrap() of {norms} norms: {1e3 * statistics.median(seconds):.1f} ms")


def build(name, options):
    extra = {"img_size": options.size} if "vit" in name else {}
    model = timm.create_model(name, num_classes=100, **extra).to(options.device).train()
    return model.to(memory_format=torch.channels_last) if options.channels_last else model


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_tiny_patch16_224"], help="timm names")
    parser.add_argument("--size", type=int, default=64, help="pixels (default: 64)")
    parser.add_argument("--batch", type=int, default=64, help="images a step (default: 64)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--repeat", type=int, default=1, help="steps per timing (default: 1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--amp", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
