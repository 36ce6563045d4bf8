"""FSDP1 flattens parameters: a step in it, or a switch of domains, raises before anything runs."""

import pytest
import torch
import torch.distributed
from torch.distributed.fsdp import FullyShardedDataParallel

import entprop_wrap as entprop
from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.methods import Vanilla
from tests.helpers.trainer_toys import BatchNormNet, make


@pytest.fixture(autouse=True)
def group(tmp_path):
    """One process is a group."""
    if torch.distributed.is_initialized():
        pytest.skip("another test's process group is open")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(flat):
    model = entprop.wrap(make(BatchNormNet)).train()
    return FullyShardedDataParallel(model, use_orig_params=not flat, device_id=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("flat", "compiled", "method"),
    [(True, False, entprop.EntProp()), (False, True, entprop.EntProp()), (False, False, Vanilla())],
    ids=["flat", "compiled", "vanilla"],
)
def test_a_step_is_refused(flat, compiled, method):
    model = torch.compile(sharded(flat)) if compiled else sharded(flat)
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(UnsupportedModelError, match=r"FSDP1 flattens parameters.*fully_shard"):
        entprop.training_step(model, torch.rand(16, 3, 8, 8), torch.arange(16) % 4, method=method)
    assert all(map(torch.equal, before, model.buffers()))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_switch_is_refused():
    with pytest.raises(UnsupportedModelError, match="FSDP1"), entprop.auxiliary(sharded(flat=True)):
        pass
