"""Lightning's DDP leaves a process group and LOCAL_RANK behind, by which the next Trainer in the process would train."""

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
