"""One thread, no network, and the same random numbers for every test."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_collection_finish(session):
    gc.freeze()  # what is imported stays: Accelerate collects garbage after every run, and would walk through it all


def pytest_sessionfinish(session):
    gc.unfreeze()  # bindings warn of what is alive after the interpreter's own collection


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
