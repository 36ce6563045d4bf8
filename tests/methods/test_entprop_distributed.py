"""EntProp's step under DDP and FSDP2 on two gloo processes, against one process that does both halves."""

import pytest
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from entprop_wrap import EntProp, MixUp
from entprop_wrap.functional import CutMix, uncertainty
from tests.helpers.processes import run_processes
from tests.helpers.versions import RECENT_TORCH
from tests.methods.test_methods_distributed import differences, gradients, mean_of_both, step
from tests.methods.test_step_loops import wrapped

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

METHODS = {
    "n=1": EntProp(fraction=0.4, mix=None),
    "n=0, mixed": EntProp(fraction=0.4, attack_steps=0, mix=MixUp()),
    "n=1, mixed, sum": EntProp(fraction=0.4, weighting="sum"),
    "n=3, mixed": EntProp(fraction=0.4, attack_steps=3),
    "n=2, cut, auxiliary": EntProp(fraction=0.4, attack_steps=2, mix=CutMix(), mix_on="auxiliary"),
    "n=2, random": EntProp(fraction=0.4, attack_steps=2, uncertainty=uncertainty.random),
    "threshold": EntProp(fraction=0.8, threshold=0.9, mix=None),
    "n=3, shared": EntProp(fraction=0.4, attack_steps=3, auxiliary=None),
}


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        if sum(1 for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank, expected):
    mesh = init_device_mesh("cpu", (2,))
    problems = []
    for (kind, name), mean in expected.items():
        for unused in (False, True):
            parallel = DistributedDataParallel(wrapped(kind), find_unused_parameters=unused)
            step(parallel, rank, METHODS[name])
            problems += differences(gradients(parallel), mean, f"DDP, {kind}, {name}, find_unused_parameters={unused}")
        if not RECENT_TORCH:
            continue
        sharded = shard(wrapped(kind), mesh)
        step(sharded, rank, METHODS[name])
        whole = {
            key: value.full_tensor() if hasattr(value, "full_tensor") else value
            for key, value in gradients(sharded).items()
        }
        problems += differences(whole, mean, f"FSDP2, {kind}, {name}")
    return problems


def test_two_processes_are_the_mean_of_two_halves():
    expected = {
        (kind, name): mean_of_both(kind, method)
        for kind in ("batch_norm", "layer_norm", "group_norm")
        for name, method in METHODS.items()
    }
    for problems in run_processes(work, expected):
        assert not problems, "\n".join(problems)
