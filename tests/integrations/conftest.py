"""Lightning's DDP leaves a process group and LOCAL_RANK behind, in which the next test's Trainer would train."""

import os
from unittest import mock

import pytest
from torch import distributed


@pytest.fixture(autouse=True)
def _one_process():
    with mock.patch.dict(os.environ):
        yield
    if distributed.is_initialized():
        distributed.destroy_process_group()
