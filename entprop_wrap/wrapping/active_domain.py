"""Which domain the norms of a wrapped model run in: per thread, and per running backward."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch

from entprop_wrap.errors import UnsupportedModelError

#: Ends the key of a domain whose running statistics are left alone.
UNRECORDED = " unrecorded"


class Rows(NamedTuple):
    """Key of a pass of ``total`` images whose first ``main`` run in the main domain, and the rest in ``auxiliary``."""

    auxiliary: str
    main: int
    total: int


#: What a norm is told: None for the main domain, the name of another (with or without its statistics), or rows.
Key: TypeAlias = "str | Rows | None"


def key_of(auxiliary: str | None, record_statistics: bool = True) -> str | None:
    """Return the key of a domain: None is the main domain with its statistics recorded, the state of rest."""
    if record_statistics:
        return auxiliary
    return (auxiliary or "") + UNRECORDED


def domains_of(key: Key) -> set[str | None]:
    """Return the domains that ``key`` runs in: names of auxiliaries, None for the main domain."""
    if isinstance(key, Rows):
        return {None, key.auxiliary}
    return {(key or "").removesuffix(UNRECORDED) or None}


class _Thread:
    """The domain that one thread is in."""

    __slots__ = ("block", "key")

    def __init__(self) -> None:
        self.block: Key = None  # the innermost auxiliary() block of this thread
        self.key: Key = None  # the same, except while a backward of another domain runs in this thread


class _EndOfBackward:
    """A callback that autograd calls when a backward succeeds, and lets go of when it fails: either ends the pin."""

    forget: weakref.finalize[..., _EndOfBackward]

    def __call__(self) -> None:
        self.forget()


class ActiveDomain:
    """The domain that the norms of one wrapped model run in: per thread, and per running backward.

    Norms all point at one switch, and the switch points at nothing of the model, so that a deep copy of a submodule
    does not drag the whole model along.
    """

    def __init__(self) -> None:
        self.local = threading.local()
        # autograd graph task -> the domain whose backward it is, and the thread that found out
        self.pins: dict[int, tuple[Key, int]] = {}
        self.owner: weakref.ref[Any] | None = None  # the registry on the wrapped root; None in an orphaned copy
        # The norms that have run, until the first pass with gradients has been checked.
        self.ran: set[int] | None = set()

    def __reduce__(self) -> tuple[type[ActiveDomain], tuple[()]]:
        return ActiveDomain, ()  # threads and running backwards belong to one process; the owner signs in again

    def thread(self) -> _Thread:
        """Return the calling thread's state, made on first use."""
        state: _Thread | None = getattr(self.local, "state", None)
        if state is None:
            state = self.local.state = _Thread()
        return state

    def resolve(self) -> Key:
        """Return the domain to run in, eagerly: the thread's own, or, in a backward, that of the pinned output.

        A norm runs inside a backward when a checkpointed block is recomputed. By then the ``auxiliary()`` block may be
        over, and on a GPU it is another thread, so only the output that is being differentiated knows the domain.
        """
        task = torch._C._current_graph_task_id()
        if task == -1:
            return self.thread().block
        if task in self.pins:
            return self.pins[task][0]
        # Reentrant checkpoints nest graph tasks within a thread: an inner one inherits, from one domain only.
        inherited = {key for key, thread in list(self.pins.values()) if thread == threading.get_ident()}
        if len(inherited) == 1:
            return inherited.pop()
        raise UnsupportedModelError(
            "A norm layer ran inside a backward pass (activation checkpointing recomputes it there), but the output "
            "being differentiated did not come from calling the wrapped model, so its domain is unknown. Expected "
            "model(images). Found a call of a part of the model: call the model that was passed to wrap(). Or "
            "torch.compile has given up on the model (it warns that dynamo hit a recompile limit), as can happen with "
            "activation checkpointing or several models in one process: before training, write "
            "torch._dynamo.config.recompile_limit = 64 (cache_size_limit in torch 2.6)."
        )

    @contextmanager
    def block(self, key: Key) -> Iterator[None]:
        """Run the norms in ``key`` inside the with-block, in this thread."""
        state, task = self.thread(), torch._C._current_graph_task_id()
        block, before = state.block, state.key
        # Entered inside a backward, it is a forward that some hook runs on purpose, and no recomputation.
        pinned = dict(self.pins) if task != -1 else {}
        state.block = state.key = key
        if task != -1:
            self.pins[task] = key, threading.get_ident()
        try:
            yield
        finally:
            state.block, state.key = block, before
            if task in pinned:
                self.pins[task] = pinned[task]
            else:
                self.pins.pop(task, None)

    def is_differentiating(self) -> bool:
        """Return whether the backward that runs in this thread, if any, is of an output of the model."""
        return torch._C._current_graph_task_id() in self.pins

    def pin(self, key: Key) -> None:
        """Say that the running backward belongs to ``key``; called by a hook on the gradient of the output."""
        task = torch._C._current_graph_task_id()
        state = self.thread()
        if task not in self.pins:
            end = _EndOfBackward()
            end.forget = weakref.finalize(end, self._forget, task, state)
            torch.autograd.Variable._execution_engine.queue_callback(end)  # type: ignore[no-untyped-call]
        self.pins[task] = key, threading.get_ident()
        state.key = key  # compiled blocks inside an eager checkpoint can read nothing else

    def _forget(self, task: int, state: _Thread) -> None:
        self.pins.pop(task, None)
        state.key = state.block
