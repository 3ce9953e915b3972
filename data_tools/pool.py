"""A pool of processes for tools that work shard by shard."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar, cast

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.interrupts import blocked, obey_only
from mepa_ds.machine import usable_cpus

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

DEFAULT_WORKERS = max(usable_cpus() - 1, 1)
"""Processes of a tool: a CPU is left to the one that collects what they make."""

_function: Callable[..., object] | None = None


def unordered_map(function: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int) -> Iterator[ResultT]:
    """Results as they come. `function` and what it is bound to pickle; 0 or 1 workers: in this process.

    Raises:
        UserError: the first that `function` raised, when the items that others work on are done; or a worker died.
    """
    if workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    # An executor notices a worker that was killed; multiprocessing.Pool puts a new one in its place, which waits for
    # ever for the lost item. Spawned: no forks of a process that has threads.
    workers, waiting = min(workers, len(items)), iter(items)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (function, os.getpid())) as pool:
        try:
            # No more items than workers are handed out, so that none is begun after one has failed.
            running = {_submit(pool, item) for item in islice(waiting, workers)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    running |= {_submit(pool, item) for item in islice(waiting, 1)}
                    yield cast(ResultT, result)
        except KeyboardInterrupt:  # to leave the pool is to wait for its workers
            log.note("stopping, when what is being written is complete; at once, if asked again")
            raise
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; run again with fewer --workers: what is "
                "complete is kept"
            ) from error


def _submit(pool: ProcessPoolExecutor, item: object) -> Future[object]:
    """May start a process, which leaves signals to this one from its first line on."""
    with blocked():
        return pool.submit(_call, item)


def _start(function: Callable[..., object], parent: int) -> None:
    global _function
    obey_only(parent)
    _function = function
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """A killed parent cannot stop its pool: workers look for themselves."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _call(item: object) -> object:
    assert _function is not None
    return _function(item)
