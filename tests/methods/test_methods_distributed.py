"""Every method on two gloo processes, against one process that does both halves one after the other.

The functions that run in the processes check several things each: starting a process costs more than the checks.
"""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import entprop_wrap as entprop
from entprop_wrap import EntProp, MixUp
from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.functional import CutMix
from entprop_wrap.functional.attacks import PGD
from entprop_wrap.methods import (
    MEADA,
    AdversarialTraining,
    AdvProp,
    EntropyAscent,
    FastAdvProp,
    FineGrainedAdvProp,
    MixProp,
    Vanilla,
)
from entprop_wrap.methods.entropic_retraining import EntropicRetraining
from entprop_wrap.methods.fast_advprop import shuffle_between_processes
from tests.helpers.processes import run_processes
from tests.helpers.versions import RECENT_TORCH
from tests.methods.loops import wrapped
from tests.reference.models import random_batch

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

HALF = 8
ATTACK = PGD(epsilon=4 / 255, steps=2)


def half_as_bright(pixels):
    return pixels / 2


METHODS = {
    "entprop": EntProp(fraction=0.4, mix=None),
    "entprop, still": EntProp(fraction=0.4, attack_steps=0, mix=MixUp()),
    "entprop, sum": EntProp(fraction=0.4, attack_steps=3, weighting="sum"),
    "entprop, auxiliary": EntProp(fraction=0.4, attack_steps=2, mix=CutMix(), mix_on="auxiliary"),
    "entprop, random": EntProp(fraction=0.4, attack_steps=2, uncertainty="random"),
    "entprop, shared": EntProp(fraction=0.4, attack_steps=3, auxiliary=None),
    "vanilla": Vanilla(entropy_weight=0.1),
    "mixprop": MixProp(),
    "advprop": AdvProp(ATTACK),
    "advprop, targeted, batch": AdvProp(ATTACK, targeted=True, attack_statistics="batch", weight=0.5),
    "fine-grained": FineGrainedAdvProp({"weak": PGD(steps=1), "dark": half_as_bright, "strong": ATTACK}, weight=0.5),
    "fast advprop": FastAdvProp(fraction=0.4, shuffle=False),
    "me-ada": MEADA(EntropyAscent(steps=2), fraction=0.5),
    "entropic retraining": EntropicRetraining(1.0, 1.0),
    "pgd": AdversarialTraining(ATTACK, clean_weight=0.3, label_smoothing=0.1),
    "trades": AdversarialTraining(ATTACK, kind="trades", entropy_weight=0.1),
}
# images shuffled between processes have other companions in a batch norm; everywhere else the mean stays the same
SHUFFLED = FastAdvProp(fraction=0.4)


def half_of(rank, seed=0):
    images, labels = random_batch(2 * HALF, seed=seed)
    share = slice(rank * HALF, (rank + 1) * HALF)
    return images[share], labels[share]


def model_for(method, kind):
    return wrapped(kind, auxiliaries=method.auxiliaries or ("aux",))


def step(model, rank, method, seed=0):
    generator = torch.Generator().manual_seed(10 * seed + rank)
    entprop.training_step(model, *half_of(rank, seed), method=method, generator=generator)


def gradients(model):
    return {
        name.removeprefix("module."): torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def buffers(model):
    return {name.removeprefix("module."): buffer.double() for name, buffer in model.named_buffers()}


def separately(kind, method, seeds=(0,), factor=1.0):
    """By two models in one process: the gradients that two processes have to agree on, and the buffers of each."""
    both = []
    for rank in (0, 1):
        model = model_for(method, kind)
        scale(model, factor)
        for seed in seeds:
            step(model, rank, method, seed)
        both.append(model)
    first, second = map(gradients, both)
    return {name: (first[name] + second[name]) / 2 for name in first}, [buffers(model) for model in both]


def mean_of_both(kind, method, seeds=(0,), factor=1.0):
    """The gradients alone."""
    return separately(kind, method, seeds, factor)[0]


def scale(model, factor):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def average(counts, bucket):
    """A communication hook of DDP's that counts how often each bucket is reduced."""
    counts[bucket.index()] = counts.get(bucket.index(), 0) + 1
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
    return work.then(lambda future: future.value()[0] / 2)


def differences(found, expected, what):
    return [
        f"{what}: {name} is {found[name].norm():.3e}, expected {wanted.norm():.3e}"
        for name, wanted in expected.items()
        if not (found[name] - wanted).norm() <= 1e-9 * wanted.norm().clamp_min(1e-3)
    ]


def check(rank, expected):
    problems = []
    for (kind, name), (mean, own_buffers) in expected.items():
        unused = kind == "layer_norm"
        method = SHUFFLED if name == "fast advprop, shuffled" else METHODS[name]
        what = f"{kind}, {name}, find_unused_parameters={unused}"
        parallel = DistributedDataParallel(model_for(method, kind), find_unused_parameters=unused)
        reductions = {}
        parallel.register_comm_hook(reductions, average)
        try:
            step(parallel, rank, method)
        except RuntimeError as error:
            problems.append(f"{what}: {error}")
            continue
        problems += differences(gradients(parallel), mean, what)
        problems += differences(buffers(parallel), own_buffers[rank], what)
        if not method.auxiliaries and any(p.grad is not None for n, p in parallel.named_parameters() if "_aux." in n):
            problems.append(f"{what}: copies have gradients, of zeros, which weight decay would follow")
        if set(reductions.values()) != {1}:
            problems.append(f"{what}: buckets are reduced {reductions} times")
    return problems


def check_no_sync(rank, expected):
    """Two steps, the first without synchronising, and a third after the optimizer's."""
    problems = []
    for (kind, name), (mean, third) in expected.items():
        parallel = DistributedDataParallel(model_for(METHODS[name], kind))
        with parallel.no_sync():
            step(parallel, rank, METHODS[name], 0)
        step(parallel, rank, METHODS[name], 1)
        problems += differences(gradients(parallel), mean, f"no_sync, {kind}, {name}")
        parallel.zero_grad()
        scale(parallel, 1.01)
        step(parallel, rank, METHODS[name], 2)
        problems += differences(gradients(parallel), third, f"after no_sync, {kind}, {name}")
    return problems


def check_sharded(rank, expected):
    """Under FSDP2 all methods but Fast AdvProp, which says that it cannot."""
    if not RECENT_TORCH:
        return []
    from torch.distributed.fsdp import fully_shard

    problems, mesh = [], init_device_mesh("cpu", (2,))
    for name, method in METHODS.items():
        model = fully_shard(model_for(method, "layer_norm"), mesh=mesh)
        if isinstance(method, FastAdvProp):
            with pytest.raises(UnsupportedModelError, match="DDP"):
                step(model, rank, method)
            continue
        step(model, rank, method)
        found = {
            key: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            for key, gradient in gradients(model).items()
        }
        problems += differences(found, expected["layer_norm", name][0], f"FSDP2, {name}")
    return problems


def check_shuffle(rank):
    images, labels = half_of(rank)
    for layout in (torch.contiguous_format, torch.channels_last):
        for soft in (False, True):
            given = torch.eye(5).double()[labels] if soft else labels
            mine = images.to(memory_format=layout)
            torch.manual_seed(rank)
            moved, moved_labels = shuffle_between_processes(mine, given, torch.Generator().manual_seed(rank))
            assert moved.shape == images.shape
            everything = [torch.empty_like(images) for _ in range(2)]
            torch.distributed.all_gather(everything, moved.contiguous())
            kept = torch.empty(2, *given.shape, dtype=given.dtype)
            torch.distributed.all_gather(list(kept.unbind()), moved_labels.contiguous())
            both = [half_of(other) for other in (0, 1)]
            before = torch.cat([pair[0] for pair in both])
            expected = torch.cat([pair[1] for pair in both])
            after = torch.cat(everything)
            order = [
                next(i for i, image in enumerate(before) if torch.equal(image, found)) for found in after
            ]  # StopIteration: an image that was nobody's
            assert sorted(order) == list(range(2 * HALF))
            assert order == torch.randperm(2 * HALF, generator=torch.Generator().manual_seed(0)).tolist()
            wanted = expected[order]
            assert torch.equal(kept.flatten(0, 1), torch.eye(5).double()[wanted] if soft else wanted)
            assert any(i >= HALF for i in order[:HALF]), "nothing was exchanged"
    fewer = HALF - 3 * rank  # a last batch
    moved, moved_labels = shuffle_between_processes(images[:fewer], labels[:fewer])
    assert len(moved) == len(moved_labels) == fewer
    everything = [None, None]
    torch.distributed.all_gather_object(everything, (moved, moved_labels))
    found = {float(image.sum()): int(label) for part in everything for image, label in zip(*part, strict=True)}
    both = zip(half_of(0), (part[: HALF - 3] for part in half_of(1)), strict=True)
    assert found == {float(image.sum()): int(label) for image, label in zip(*map(torch.cat, both), strict=True)}


def work(rank, expected, unsynchronised):
    check_shuffle(rank)
    return check(rank, expected) + check_no_sync(rank, unsynchronised) + check_sharded(rank, expected)


def test_two_processes_are_the_mean_of_two_halves():
    expected = {
        (kind, name): separately(kind, METHODS[name]) for kind in ("batch_norm", "layer_norm") for name in METHODS
    }
    expected["group_norm", "fast advprop, shuffled"] = separately("group_norm", SHUFFLED)
    unsynchronised = {
        ("group_norm", name): (
            mean_of_both("group_norm", method, (0, 1)),
            mean_of_both("group_norm", method, (2,), factor=1.01),
        )
        for name, method in METHODS.items()
    }
    for problems in run_processes(work, expected, unsynchronised):
        assert not problems, "\n".join(problems)


def test_one_process_shuffles_nothing():
    images, labels = half_of(0)
    state = torch.get_rng_state()
    moved, moved_labels = shuffle_between_processes(images, labels)
    assert moved is images
    assert moved_labels is labels
    assert torch.equal(torch.get_rng_state(), state)
