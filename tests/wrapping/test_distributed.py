"""DDP and FSDP2 on two gloo processes, against one process with the whole batch; steps are in tests/methods."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import entprop_wrap as entprop
from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.utils.modules import no_gradient_sync
from tests.helpers.keys import is_auxiliary_key
from tests.helpers.norm_nets import rows, toy
from tests.helpers.oracle import perturb
from tests.helpers.processes import run_processes
from tests.helpers.versions import RECENT_TORCH

STEPS = 3


def _model(norm="layer", mode="none"):
    model = entprop.wrap(toy(norm, mode).double())
    perturb(model)
    return model


def _batch(step):
    return rows(8, seed=step).double()


def _hard(batch):
    return 0.5 * batch.flip(1)


def _loss(output, batch):
    # Labels by content, so that half a batch has the labels it has in the whole batch.
    labels = (batch.sum(1) * 7).long().abs() % 5
    return torch.nn.functional.cross_entropy(output, labels)


def _two_passes(call, batch):
    """Main pass without synchronising, auxiliary pass with: how the training step does it."""
    with no_gradient_sync(call):
        _loss(call(batch), batch).backward()
    with entprop.auxiliary(call):
        loss = _loss(call(_hard(batch)), batch)
    loss.backward()


def _main_only(call, batch):
    _loss(call(batch), batch).backward()


def _train(call, share=slice(None), passes=_two_passes):
    optimizer = torch.optim.SGD(call.parameters(), lr=0.1, momentum=0.9)
    gradients = []
    for step in range(STEPS):
        batch = _batch(step)
        for each in (passes,) if callable(passes) else (passes[step],):
            each(call, batch[share])
        gradients.append({n.removeprefix("module."): p.grad for n, p in call.named_parameters()})
        gradients[-1] = {n: None if g is None else g.clone() for n, g in gradients[-1].items()}
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def _same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        for name, gradient in theirs.items():
            ours = mine[name]
            if ours is None or gradient is None:  # DDP gives zeros where there is nothing
                assert ours is None or not ours.any(), name
                assert gradient is None or not gradient.any(), name
            else:
                torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-11, msg=name)


def _ddp(rank):
    share = slice(4 * rank, 4 * rank + 4)
    single = _train(_model())
    for unused in (False, True):
        parallel = DistributedDataParallel(_model(mode="plain" if unused else "none"), find_unused_parameters=unused)
        _same(_train(parallel, share), single)
        entprop.unwrap(parallel)
        assert not any(is_auxiliary_key(key) for key in parallel.state_dict())

    # Steps of one domain only, and mixed with steps of both.
    for unused, schedule in ((False, (_main_only,) * 3), (True, (_main_only, _two_passes, _main_only))):
        wanted = _train(_model(), passes=schedule)
        _same(_train(DistributedDataParallel(_model(), find_unused_parameters=unused), share, schedule), wanted)

    # Fine-tuning in eval mode.
    model = _model("batch").eval()
    wanted = _train(copy.deepcopy(model))
    _same(_train(DistributedDataParallel(model), share), wanted)

    # Batch norms: every process keeps its statistics, as always; the copies' too. Buffers are broadcast.
    model = _model("batch")
    _train(DistributedDataParallel(model), share)
    for block in model.blocks:
        assert block.inner.num_batches_tracked == block.inner.entprop_aux.num_batches_tracked == STEPS

    # An infinite copy stays out of the main pass.
    model = _model()
    with torch.no_grad():
        model.last.entprop_aux.weight[0] = float("inf")
    parallel = DistributedDataParallel(model)
    loss = _loss(parallel(_batch(0)[share]), _batch(0)[share])
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for n, p in model.named_parameters() if not is_auxiliary_key(n))

    # Logits may be modified in place.
    logits = _model()(_batch(0))
    logits[:, 0] = -1.0
    logits.div_(2.0).sum().backward()

    # Copies of a part of the tensors.
    for unused, copies in ((False, "affine"), (True, "statistics")):
        alone = entprop.wrap(toy("batch").double(), copies=copies)
        parallel = DistributedDataParallel(copy.deepcopy(alone), find_unused_parameters=unused)
        for _ in range(2):  # the same batch on both, whose mean is that of one
            for call in (alone, parallel):
                call.zero_grad()
                _two_passes(call, _batch(0))
        for (name, mine), other in zip(alone.named_parameters(), parallel.parameters(), strict=True):
            torch.testing.assert_close(other.grad, mine.grad, msg=f"{copies} {name}")

    with pytest.raises(UnsupportedModelError, match="first, then use DDP or FSDP2"):
        entprop.wrap(DistributedDataParallel(toy()))
    if RECENT_TORCH:
        _fsdp(share, single)


def _fsdp(share, single):
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    mesh = init_device_mesh("cpu", (2,))
    sharded = shard(_model(mode="plain"))
    found = _train(sharded, share)
    _same([{n: None if g is None else g.full_tensor() for n, g in step.items()} for step in found], single)
    assert any(is_auxiliary_key(key) for key in sharded.state_dict())
    entprop.unwrap(sharded)
    assert not any(is_auxiliary_key(key) for key in sharded.state_dict())
    with pytest.raises(UnsupportedModelError, match="first, then use DDP or FSDP2"):
        entprop.wrap(shard(toy().double()))


def test_two_processes():
    run_processes(_ddp)


def test_no_sync_is_found_in_containers():
    assert isinstance(no_gradient_sync(toy()), contextlib.nullcontext)
    assert isinstance(no_gradient_sync(torch.compile(toy(), backend="eager")), contextlib.nullcontext)
    assert isinstance(no_gradient_sync(nn.Sequential(toy())), contextlib.nullcontext)
