"""Two processes give the result of one, and refuse data that they do not both go through."""

import os

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset

from entprop_wrap.errors import DataError
from entprop_wrap.robustness import PGD, accuracy_against_epsilon, evaluate_robustness
from tests.helpers.processes import run_processes
from tests.helpers.small_classifier import SPACE, classifier, dataset

OPTIONS = {"corruptions": ("gaussian_noise",), "severities": (4,), "pixel_space": SPACE, "progress": False}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset(9))


def found(data, model=None):
    attacks = {"PGD": PGD(2 / 255, steps=1)}
    return evaluate_robustness(model or classifier(), data, attacks=attacks, shifts={"again": data}, **OPTIONS)


def curve():
    data = DataLoader(dataset(9), batch_size=4)
    return accuracy_against_epsilon(classifier(), data, (0, 2 / 255), pixel_space=SPACE, progress=False)


def every_score(result):
    return [result.clean, *result.corrupted.values(), *result.shifts.values(), *result.adversarial.values()]


def work(rank):
    from accelerate import Accelerator

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # the group there is serves
    prepare = Accelerator(cpu=True).prepare
    data = DataLoader(dataset(9), batch_size=4)
    for other in (
        prepare(data),
        prepare(DataLoader(Stream(), batch_size=4)),
        DataLoader(dataset(9), 4, sampler=DistributedSampler(dataset(9), shuffle=False)),
        DataLoader(Subset(dataset(9), range(rank, 9, 2)), batch_size=4),
        DataLoader(dataset(9), batch_size=4, shuffle=True),
        [] if rank else data,
    ):
        with pytest.raises(DataError, match="the 2 processes do not go through the same batches"):
            found(other)
    with pytest.raises(DataError, match="empty"):
        found([])
    model = torch.nn.parallel.DistributedDataParallel(classifier()).eval()
    shared = [found(DataLoader(dataset(3), batch_size=4)), found(DataLoader(Stream(), batch_size=5), model)]
    return [result.to_dict() for result in shared], shared, curve()


def test_two_processes_equal_one():
    first, second = run_processes(work)
    assert first[0] == second[0]
    alone = [found(DataLoader(dataset(count), batch_size=4)) for count in (3, 9)]
    for ours, theirs in zip(first[1], alone, strict=True):
        for a, b in zip(every_score(ours), every_score(theirs), strict=True):
            assert (a.images, a.accuracy) == (b.images, b.accuracy)
            assert vars(a) == pytest.approx(vars(b), rel=1e-4)  # sums of losses were added in another order
    assert first[2] == second[2] == curve()
