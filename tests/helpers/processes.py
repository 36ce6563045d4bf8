"""Runs a function in two gloo processes on this machine, as torchrun would, and hands back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from tests.helpers.worker import settle

PROCESSES = 2
LIMIT = timedelta(seconds=60)

#: What takes long to import: done once, in the server that processes are forked from.
HEAVY = [
    "tests.helpers.worker",
    "pytest",
    "torch._dynamo.convert_frame",
    "torch._dynamo.backends.debugging",
    "torch.distributed.fsdp",
    "accelerate",
    "transformers.trainer",
    "lightning.pytorch",
    "entprop_wrap.methods",
    "entprop_wrap.trainer",
    "tests.faults.accidents",
]


def context() -> multiprocessing.context.BaseContext:
    """Return how processes start: forked from a server that has imported what this process has, and run nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([name for name in HEAVY if name.partition(".")[0] in sys.modules])
    return server


def run_processes(function: Callable[..., Any], *args: Any, group: bool = True) -> list[Any]:
    """Call ``function(rank, *args)`` in each of two processes; return the results by rank.

    ``function`` must be importable. An exception in one process is raised here with its traceback. Without ``group``,
    ``function`` makes the process group itself, from the environment that torchrun gives.
    """
    method = context().get_start_method()
    with tempfile.TemporaryDirectory() as folder:
        # A file, as a server is sent few tensors only: each takes a descriptor.
        (Path(folder) / "call").write_bytes(pickle.dumps((function, args)))
        port = None if group else _free_port()
        torch.multiprocessing.start_processes(_work, (folder, port), nprocs=PROCESSES, start_method=method)
        results = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(PROCESSES)]
    errors = [result for succeeded, result in results if not succeeded]
    if errors:
        raise AssertionError("\n".join(errors))
    return [result for _, result in results]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _work(rank: int, folder: str, port: int | None) -> None:
    settle()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    if port is None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES, timeout=LIMIT
        )
    else:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        function, args = pickle.loads((Path(folder) / "call").read_bytes())
        outcome = True, function(rank, *args)
    except BaseException:
        outcome = False, f"process {rank}: {traceback.format_exc()}"
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(outcome))
    if outcome[0] and torch.distributed.is_initialized():  # after a failure the other may wait in a collective
        torch.distributed.destroy_process_group()
    os._exit(0)  # an orderly exit sometimes aborts, where a container that is still alive holds threads of gloo
