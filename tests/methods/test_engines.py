"""Every engine gives what one plain float64 process gives, step for step: the two-pass step and the lagged one.

Three steps with momentum, the last on an uneven batch. Other methods and options on DDP and FSDP2 are in
test_methods_distributed.py, what accumulation and precision do to them in test_methods_loops.py.
"""

import contextlib
import functools
import warnings

import pytest
import torch
from accelerate.utils import compile_regions
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import entprop_wrap as entprop
from entprop_wrap import EntProp
from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.methods.lagged import lagged_state, load_lagged_state
from tests.helpers.keys import is_auxiliary_key
from tests.helpers.processes import run_processes
from tests.helpers.versions import RECENT_TORCH

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

METHODS = {
    "two passes": EntProp(fraction=0.4, epsilon=0.03),
    "lagged": EntProp(fraction=0.4, epsilon=0.03, lagged=True),
}
SIZES = (8, 8, 6)
STEPS = len(SIZES)
FEWER = 2  # where code is compiled: compiling again for another size is slow


class Block(nn.Module):
    def __init__(self, width, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x)

    def run(self, x):
        return x + torch.tanh(self.conv(self.norm(x)))


class Net(nn.Module):
    """Repeated blocks, which engines checkpoint, compile and shard; batch norms in them and a layer norm after them."""

    def __init__(self, checkpointed):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=2)
        self.blocks = nn.ModuleList(Block(4, checkpointed) for _ in range(2))
        self.last = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)

    def forward(self, images):
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x.mean((2, 3))))


def make(checkpointed=False):
    """A wrapped net whose copies differ from its norms; always the same."""
    torch.manual_seed(0)
    model = entprop.wrap(Net(checkpointed).double())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch(step, rank=0):
    generator = torch.Generator().manual_seed(10 * step + rank)
    images = torch.rand(SIZES[step], 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (SIZES[step],), generator=generator)


def take_step(call, method, step, rank=0):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return entprop.training_step(call, *batch(step, rank), method=method, generator=generator)


def plain_name(name):
    return name.replace("_orig_mod.", "").removeprefix("module.")


def gradients(model):
    found = {plain_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in found.items()}


def buffers(model):
    return {plain_name(name): buffer.double() for name, buffer in model.named_buffers()}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def resumed_state(rank):
    """What waits for the first step of a resumed run."""
    generator = torch.Generator().manual_seed(100 + rank)
    images = torch.rand(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"images": images, "labels": torch.tensor([0, 3, 1]), "share": torch.tensor(1.0)}


def train(call, method, rank=0, resumed=False, steps=STEPS):
    """Return the gradients of each step, and the buffers after the last."""
    if resumed:
        load_lagged_state(call, resumed_state(rank))
    optimizer, found = sgd(call), []
    for step in range(steps):
        take_step(call, method, step, rank)
        found.append(gradients(call))
        optimizer.step()
        optimizer.zero_grad()
    return found, buffers(call)


def together(method, resumed=False, steps=STEPS, ranks=2):
    """One process in the place of several: the mean gradients of each step, and the buffers of each rank."""
    models = [make() for _ in range(ranks)]
    for rank, model in enumerate(models):
        if resumed:
            load_lagged_state(model, resumed_state(rank))
    optimizers, found = [sgd(model) for model in models], []
    for step in range(steps):
        for rank, model in enumerate(models):
            take_step(model, method, step, rank)
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            given = [p.grad for p in parameters if p.grad is not None]
            for parameter in parameters if given else ():
                parameter.grad = sum(given) / ranks
        found.append(gradients(models[0]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return found, [buffers(model) for model in models]


def differences(found, expected, what):
    return [
        f"{what}: {name} is {float(found.get(name, torch.tensor(0.0)).norm()):.3e}, expected {float(wanted.norm()):.3e}"
        for name, wanted in expected.items()
        if name not in found or not (found[name] - wanted).norm() <= 1e-9 * wanted.norm().clamp_min(1e-3)
    ]


def compare(found, expected, what, with_buffers=True):
    problems = []
    for step, (ours, theirs) in enumerate(zip(found[0], expected[0], strict=True)):
        problems += differences(ours, theirs, f"{what}, step {step}")
    return problems + (differences(found[1], expected[1], what) if with_buffers else [])


@contextlib.contextmanager
def settings_of(engine):
    """Have dynamo leave out side effects of a forward that a checkpoint recomputes, where the engine's name says so."""
    option = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    torch._dynamo.reset()
    patched = {option: True} if "effects skipped" in engine and hasattr(torch._dynamo.config, option) else {}
    with torch._dynamo.config.patch(**patched) if patched else contextlib.nullcontext():
        yield


# One process ----------------------------------------------------------------------------------------------------------


def compiled(model, backend="aot_eager"):
    return torch.compile(model, backend=backend)


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def regions(model, backend="aot_eager"):
    return compile_regions(model, backend=backend)


ENGINES = {
    "channels_last": (False, lambda model: model.to(memory_format=torch.channels_last)),
    "checkpointed": (True, lambda model: model),
    "compiled in place": (False, compiled_in_place),
    "compiled, checkpointed": (True, compiled),
    "regions, checkpointed, effects skipped": (True, regions),
}


@functools.cache
def expected(name, resumed, steps):
    return train(make(), METHODS[name], resumed=resumed, steps=steps)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process(engine):
    checkpointed, prepare = ENGINES[engine]
    few = engine.startswith(("compiled", "regions"))
    steps = FEWER if few else STEPS
    if "," in engine and not RECENT_TORCH:
        pytest.skip("torch 2.6 records batch statistics twice under a compiled checkpoint")
    recorded_twice = engine == "checkpointed"  # by the recomputation, in any model
    problems = []
    for name, method in METHODS.items():
        model, resumed = make(checkpointed), few and method.lagged  # resumed: one size, so one graph
        with settings_of(engine):
            found = train(prepare(model), method, resumed=resumed, steps=steps)
            problems += compare(found, expected(name, resumed, steps), name, not recorded_twice)
        assert bool(lagged_state(model)) == method.lagged
        entprop.unwrap(model)
        assert not any(is_auxiliary_key(key) for key in model.state_dict())
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", METHODS)
def test_accumulated_gradients_are_the_sum_of_the_steps(name):
    model, singles = make(), make()
    total = {}
    for step in range(STEPS):
        take_step(model, METHODS[name], step)
        take_step(singles, METHODS[name], step)
        for parameter, gradient in gradients(singles).items():
            total[parameter] = total.get(parameter, 0) + gradient
        singles.zero_grad()
    assert not differences(gradients(model), total, name)


# Two processes --------------------------------------------------------------------------------------------------------


def ddp(model, mesh, **options):
    return DistributedDataParallel(model, **options)


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_compiled_blocks(model, mesh):
    """Checkpoint, compile, shard, block by block: the order of trainers at scale."""
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return shard(model, mesh)


DISTRIBUTED = {
    "DDP": (False, ddp),
    "DDP, find_unused_parameters": (False, lambda model, mesh: ddp(model, mesh, find_unused_parameters=True)),
    "DDP, checkpointed": (True, ddp),
    "DDP, compiled": (False, lambda model, mesh: compiled(ddp(model, mesh), "eager")),
    "DDP, regions": (False, lambda model, mesh: ddp(regions(model, "eager"), mesh)),
    "FSDP2": (False, shard),
    "FSDP2, checkpointed": (True, shard),
    "FSDP2, checkpointed, compiled, effects skipped": (True, shard_compiled_blocks),
}
#: Compiling takes a second per process and method: what one process has shown for both is left out here.
COMPILED = {
    "DDP, compiled": ["lagged"],
    "DDP, regions": ["two passes"],
    "FSDP2, checkpointed, compiled, effects skipped": ["two passes", "lagged"],
}


def distributed(rank, expected):
    few_images(rank)
    first_lagged(rank)
    warnings.simplefilter("ignore")
    mesh, problems = init_device_mesh("cpu", (2,)), []
    for engine, (checkpointed, prepare) in DISTRIBUTED.items():
        if "FSDP2" in engine and not RECENT_TORCH:
            continue
        for (name, resumed, steps), (gradients, own) in expected.items():
            if (steps == FEWER) != (engine in COMPILED) or name not in COMPILED.get(engine, METHODS):
                continue
            with settings_of(engine):
                found = train(prepare(make(checkpointed), mesh), METHODS[name], rank, resumed, steps)
            # DDP gives every process the first one's statistics, FSDP2 leaves each its own.
            eager_twice = checkpointed and engine not in COMPILED
            with_buffers = not eager_twice and (rank == 0 or "FSDP2" in engine)
            problems += compare(found, (gradients, own[rank]), f"{engine}, {name}, resumed={resumed}", with_buffers)
    if RECENT_TORCH:
        refuse_other_sizes(shard(make(), mesh))
    return problems


def few_images(rank):
    with pytest.warns(UserWarning, match="Only 3 images a step"):  # not 6, of both processes
        take_step(DistributedDataParallel(make()), METHODS["two passes"], 0, rank)


def first_lagged(rank):
    """Nothing has run through the copies yet: zeros for gradients would let weight decay and momentum move them."""
    parallel = DistributedDataParallel(make())
    copies = [p for name, p in parallel.named_parameters() if is_auxiliary_key(name)]
    take_step(parallel, METHODS["lagged"], 0, rank)
    assert all(p.grad is None for p in copies)
    take_step(parallel, METHODS["lagged"], 1, rank)
    assert all(p.grad is not None for p in copies)
    other = DistributedDataParallel(make())  # one process has images from the step before, and all have its gradients
    if rank == 0:
        load_lagged_state(other, resumed_state(rank))
    take_step(other, METHODS["lagged"], 0, rank)
    assert all(p.grad.any() for name, p in other.named_parameters() if name.endswith("last.entprop_aux.weight"))


def refuse_other_sizes(model):
    """Where processes could come to reduce different gradients, and wait for one another."""
    take_step(model, METHODS["lagged"], 0)
    images, labels = batch(0)
    larger = torch.nn.functional.interpolate(images, size=12)
    with pytest.raises(UnsupportedModelError, match=r"every process.*load_lagged_state"):
        entprop.training_step(model, larger, labels, method=METHODS["lagged"])
    load_lagged_state(model, {})
    entprop.training_step(model, larger, labels, method=METHODS["lagged"])


def test_two_processes():
    """The mean of both processes' gradients; each selects among its own images, and keeps its own hardened ones."""
    eager = [("two passes", False, STEPS), ("lagged", False, STEPS), ("lagged", True, STEPS)]
    cases = [*eager, ("two passes", False, FEWER), ("lagged", True, FEWER)]  # resumed: one size, so one graph
    expected = {case: together(METHODS[case[0]], *case[1:]) for case in cases}
    for problems in run_processes(distributed, expected):
        assert not problems, "\n".join(problems)
