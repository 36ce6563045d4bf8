"""One thread, no network, and the same random numbers for every test."""

import gc
import os

import pytest

from tests.helpers.worker import settle

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.fsync = lambda descriptor: None  # no test cuts the power, and all would wait for the disk


def pytest_itemcollected(item):
    """Keep what forks processes in one of pytest's workers, so that one server imports what they need."""
    if {"run_processes", "context"} & vars(item.module).keys() or item.module.__name__ == "tests.faults.test_kill":
        item.add_marker(pytest.mark.xdist_group("processes"))


def pytest_collection_finish(session):
    settle()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and nextitem.module is not item.module:
        gc.collect()
        gc.freeze()  # what the module's tests imported and compiled stays, too


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)
