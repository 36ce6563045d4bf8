"""Two processes give the result of one, whatever kind of loader they are given."""

import os
import socket

import pytest
import torch
from torch import distributed, multiprocessing
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset

from entprop_wrap.errors import DataError
from entprop_wrap.robustness import PGD, accuracy_against_epsilon, evaluate_robustness
from tests.helpers.small_classifier import SPACE, classifier, dataset

OPTIONS = {"corruptions": ("gaussian_noise", "fog"), "severities": (4,), "pixel_space": SPACE, "progress": False}
ATTACKS = {"PGD": PGD(2 / 255, steps=2)}


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(dataset(self.count))


def found(data):
    return evaluate_robustness(classifier(), data, attacks=ATTACKS, **OPTIONS)


def same(ours, theirs):
    """Counts are equal; sums of losses were added in another order."""
    assert ours.images == theirs.images
    for a, b in [
        (ours.clean, theirs.clean),
        *((ours.corrupted[key], theirs.corrupted[key]) for key in theirs.corrupted),
        *((ours.adversarial[key], theirs.adversarial[key]) for key in theirs.adversarial),
    ]:
        assert (a.images, a.accuracy) == (b.images, b.accuracy)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.calibration_error == pytest.approx(b.calibration_error, rel=1e-4)


def work(process, port, results):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(process), LOCAL_RANK=str(process), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerators = {
        name: Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
        for name, options in {
            "prepared": {},
            "split": {"split_batches": True},
            "uneven": {"even_batches": False},
            "dispatched": {"dispatch_batches": True},
        }.items()
    }
    assert distributed.get_world_size() == 2
    for count in (3, 9, 12):
        expected = results[count]
        for name, accelerator in accelerators.items():
            if (name, count) in (("split", 3), ("split", 12), ("dispatched", 12)):
                continue  # accelerate itself cannot split fewer images than a batch holds; 12 is for full last batches
            data = accelerator.prepare(DataLoader(dataset(count), batch_size=4))
            same(found(data), expected)
        same(found(accelerators["prepared"].prepare(DataLoader(Stream(count), batch_size=4))), expected)
        same(found(DataLoader(dataset(count), batch_size=4)), expected)
        same(found(list(DataLoader(dataset(count), batch_size=5))), expected)

        # Shares without known places: every image counts once, but noise is drawn for each process.
        sampler = DistributedSampler(dataset(count), shuffle=False)
        shards = Subset(dataset(count), range(process, count, 2))
        for data in (DataLoader(dataset(count), 4, sampler=sampler), DataLoader(shards, batch_size=4)):
            ours = found(data)
            assert ours.clean.images == expected.clean.images
            assert ours.sa == expected.sa
            assert ours.corrupted["fog", 4].images == count
        gathered = [None, None]
        distributed.all_gather_object(gathered, ours.to_json())
        assert gathered[0] == gathered[1]
    data = accelerators["prepared"].prepare(DataLoader(dataset(9), batch_size=4))
    curve = accuracy_against_epsilon(classifier(), data, (0, 2 / 255), pixel_space=SPACE, progress=False)
    assert curve == results["curve"]

    streamed = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    with pytest.raises(DataError, match="dispatch_batches=True"):
        found(streamed.prepare(DataLoader(Stream(9), batch_size=4)))
    with pytest.raises(DataError, match="shuffle=True"):
        found(DataLoader(dataset(9), batch_size=4, shuffle=True))
    with pytest.raises(DataError, match="empty"):
        found([])
    model = torch.nn.parallel.DistributedDataParallel(classifier())
    data = DataLoader(dataset(9), batch_size=4)
    ours = evaluate_robustness(model.eval(), data, attacks=ATTACKS, shifts={"again": data}, **OPTIONS)
    same(ours, results[9])
    assert ours.shifts["again"] == ours.clean
    distributed.destroy_process_group()


def test_two_processes_equal_one():
    results = {count: found(DataLoader(dataset(count), batch_size=4)) for count in (3, 9, 12)}
    data = DataLoader(dataset(9), batch_size=4)
    results["curve"] = accuracy_against_epsilon(classifier(), data, (0, 2 / 255), pixel_space=SPACE, progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, results), nprocs=2)
