"""Two processes give the result of one, and refuse data that they do not both go through."""

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
    def __iter__(self):
        return iter(dataset(9))


def found(data, model=None):
    return evaluate_robustness(model or classifier(), data, attacks=ATTACKS, shifts={"again": data}, **OPTIONS)


def curve(data):
    return accuracy_against_epsilon(classifier(), data, (0, 2 / 255), pixel_space=SPACE, progress=False)


def same(ours, theirs):
    """Counts are equal; sums of losses were added in another order."""
    for a, b in zip(every_score(ours), every_score(theirs), strict=True):
        assert (a.images, a.accuracy) == (b.images, b.accuracy)
        assert vars(a) == pytest.approx(vars(b), rel=1e-4)


def every_score(result):
    return [result.clean, *result.corrupted.values(), *result.shifts.values(), *result.adversarial.values()]


def work(process, port, results):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(process), LOCAL_RANK=str(process), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert distributed.get_world_size() == 2
    for count in (3, 9, 12):
        same(found(DataLoader(dataset(count), batch_size=4)), results[count])
    ours = found(DataLoader(Stream(), batch_size=5), torch.nn.parallel.DistributedDataParallel(classifier()).eval())
    same(ours, results[9])
    gathered = [None, None]
    distributed.all_gather_object(gathered, ours.to_json())
    assert gathered[0] == gathered[1]
    assert curve(DataLoader(dataset(9), batch_size=4)) == results["curve"]

    data = DataLoader(dataset(9), batch_size=4)
    for other in (
        accelerator.prepare(data),
        accelerator.prepare(DataLoader(Stream(), batch_size=4)),
        DataLoader(dataset(9), 4, sampler=DistributedSampler(dataset(9), shuffle=False)),
        DataLoader(Subset(dataset(9), range(process, 9, 2)), batch_size=4),
        DataLoader(dataset(9), batch_size=4, shuffle=True),
        [] if process else data,
    ):
        with pytest.raises(DataError, match="the 2 processes do not go through the same batches"):
            found(other)
    with pytest.raises(DataError, match="empty"):
        found([])
    distributed.destroy_process_group()


def test_two_processes_equal_one():
    results = {count: found(DataLoader(dataset(count), batch_size=4)) for count in (3, 9, 12)}
    results["curve"] = curve(DataLoader(dataset(9), batch_size=4))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, results), nprocs=2)
