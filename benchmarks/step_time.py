"""How much time and memory an EntProp step takes, against the least it could take, and against what others take.

    python benchmarks/step_time.py                                        # a CNN and a ViT on the CPU
    python benchmarks/step_time.py --peers                                # ... and the loops that others write
    python benchmarks/step_time.py --models resnet50 --size 224 --batch 256 --device cuda --amp bf16 --channels-last

The floor is the same passes written bare on the plain model: one pass of the batch with the gradient of the images,
n - 1 pixel-gradient passes of k|B| images, one training pass of k|B| images; no mixing, selection, checks or switching.
Of the lagged step it is one pass of as many images, with their gradient.
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
from step_time_peers import PEERS
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
        bench = Bench(name, options)
        for setting, method in METHODS.items():
            bench.compare(setting, method)
        bench.inference()
    if options.peers:
        print(f"\ntimm {timm.__version__}\n\n| model | loop | passes | time / vanilla | ours / loop (quartiles) |")
        print("|---|---|---|---|---|")
        for name in options.models:
            for row in Bench(name, options).peers():
                print(f"| {' | '.join(map(str, row))} |", flush=True)
    wrapping_time()


class Bench:
    """One model, plain and wrapped, on one batch.

    Attributes:
        name: timm's.
        plain: The model as it comes.
        wrapped: Its wrapped twin.
        images: ``(batch, 3, size, size)``.
        labels: ``(batch,)``.
    """

    def __init__(self, name, options):
        self.name, self.options = name, options
        self.plain = build(name, options)
        images = torch.rand(options.batch, 3, options.size, options.size, device=options.device)
        self.images = images.contiguous(memory_format=torch.channels_last) if options.channels_last else images
        self.labels = torch.randint(0, 100, (options.batch,), device=options.device)
        self.wrapped = entprop.wrap(copy.deepcopy(self.plain))
        self.vanilla = self.step(Vanilla(), self.plain)

    def run(self, function):
        """Return ``function`` under the precision of the options, without arguments."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.amp)

        def call():
            with nullcontext() if kind is None else torch.autocast(self.options.device, kind):
                return function()

        return call

    def step(self, method, model=None):
        """Return what takes a training step of ``method``."""
        model = self.wrapped if model is None else model
        return self.run(lambda: entprop.training_step(model, self.images, self.labels, method=method))

    def bare(self, method):
        """Return what runs the passes of ``method``, and nothing else."""
        return self.run(lambda: floor(self.plain, self.images, self.labels, method))

    def times(self, *functions):
        """Return the seconds of each function, interleaved."""
        return interleaved(functions, [self.plain, self.wrapped], self.options)

    def memory(self, function, model):
        """Return the peak memory of ``function`` in bytes."""
        return peak_memory(function, model, self.options.device)

    def compare(self, setting, method):
        """Print a step of ``method`` against its floor and a vanilla step."""
        step = self.step(method)
        step()  # of a lagged method, nothing comes back in it
        passes = step().passes
        floors, steps, vanillas = self.times(self.bare(method), step, self.vanilla)
        low, middle, high = ratio(steps, floors)
        memory = self.memory(step, self.wrapped) / self.memory(self.vanilla, self.plain)
        print(
            f"| {self.name} | {setting} | {middle:.3f} ({low:.3f} to {high:.3f}) | {ratio(steps, vanillas)[1]:.2f} | "
            f"{passes:.1f} | {1e3 * statistics.median(floors):.0f} | {memory:.2f} |",
            flush=True,
        )

    def peers(self):
        """Yield the loops of others, next to a vanilla step and to ours of the same work, as rows of a table."""
        for name, (prepare, loop, passes, same) in PEERS.items():
            model = prepare(copy.deepcopy(self.plain))
            if model is None:
                continue
            functions = [self.run(lambda: loop(model, self.images, self.labels)), self.vanilla]  # noqa: B023
            if same is not None:
                functions.append(self.step(same))
            theirs, vanillas, *ours = interleaved(functions, [model, self.plain, self.wrapped], self.options)
            against = "{1:.3f} ({0:.3f} to {2:.3f})".format(*ratio(ours[0], theirs)) if ours else "-"
            yield [self.name, name, passes, f"{ratio(theirs, vanillas)[1]:.2f}", against]

    def inference(self):
        """Compare a model that was wrapped and unwrapped with one that never was."""
        self.plain.eval()
        returned = entprop.unwrap(entprop.wrap(copy.deepcopy(self.plain)))
        with torch.no_grad():
            equal = torch.equal(returned(self.images), self.plain(self.images))
            plain, again = self.times(lambda: self.plain(self.images), lambda: returned(self.images))
        middle = ratio(again, plain)[1]
        print(f"| {self.name} inference after unwrap: {middle:.3f} of plain, equal: {equal} | | | | | | |")
        self.plain.train()


def ratio(times, others):
    """Return quartiles of the ratios of ``times`` to ``others``, round by round."""
    return statistics.quantiles([a / b for a, b in zip(times, others, strict=True)], n=4)


def floor(model, images, labels, method):
    """Run the passes of an EntProp step, and nothing else."""
    number = num_selected(len(images), method.fraction)
    if method.lagged:
        rows = range(len(images) + (0 if method.equal_budget else number))
        rows = torch.tensor([row % len(images) for row in rows], device=images.device)
        F.cross_entropy(model(images[rows].requires_grad_()), labels[rows]).backward()
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
    parser.add_argument("--peers", action="store_true", help="time the loops of others, too")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
