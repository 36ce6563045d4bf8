"""Runs a function in two gloo processes on this machine, as torchrun would, and hands back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

LIMIT = timedelta(seconds=60)

#: What takes long to import: done once, in the server that processes are forked from.
HEAVY = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "accelerate",
    "entprop_wrap.methods",
    "entprop_wrap.trainer",
]


def context() -> multiprocessing.context.BaseContext:
    """Return how processes start: forked from a server that is fresh, but for what it has imported; else anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(HEAVY)
    return server


def run_processes(function: Callable[..., Any], *args: Any, processes: int = 2) -> list[Any]:
    """Call ``function(rank, *args)`` in each process of a gloo group; return the results by rank.

    ``function`` must be importable. An exception in one process is raised here with its traceback.
    """
    method = context().get_start_method()
    with tempfile.TemporaryDirectory() as folder:
        # A file, as a server is sent few tensors only: each takes a descriptor.
        (Path(folder) / "call").write_bytes(pickle.dumps((function, args)))
        torch.multiprocessing.start_processes(_work, (processes, folder), nprocs=processes, start_method=method)
        results = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(processes)]
    errors = [result for succeeded, result in results if not succeeded]
    if errors:
        raise AssertionError("\n".join(errors))
    return [result for _, result in results]


def _work(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes, timeout=LIMIT
    )
    try:
        function, args = pickle.loads((Path(folder) / "call").read_bytes())
        outcome = True, function(rank, *args)
    except BaseException:
        outcome = False, f"process {rank}: {traceback.format_exc()}"
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(outcome))
    if outcome[0]:  # after a failure the other process may be waiting in a collective
        torch.distributed.destroy_process_group()
    os._exit(0)  # an orderly exit sometimes aborts, where a container that is still alive holds threads of gloo
