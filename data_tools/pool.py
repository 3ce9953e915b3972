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
"""Worker processes of a tool: one CPU is left for the process that collects their results."""

_function: Callable[..., object] | None = None


def unordered_map(function: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int) -> Iterator[ResultT]:
    """Yields results in the order in which they are ready. With 0 or 1 workers all work is done in this process.

    `function` and what it is bound to must pickle.

    Raises:
        UserError: the first one that `function` raised, once the items under way are done; or a worker was killed.
    """
    if workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    # An executor notices a killed worker; multiprocessing.Pool replaces it, and waits for ever for the lost item.
    # Workers are spawned, since a process that has threads should not fork.
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
        except KeyboardInterrupt:  # leaving the pool waits for its workers
            log.note("stopping once the shards under way are complete; another signal stops at once")
            raise
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; run again with fewer --workers: what is "
                "complete is kept"
            ) from error


def _submit(pool: ProcessPoolExecutor, item: object) -> Future[object]:
    """Hands out an item. A worker process that this starts leaves signals to this one from its first line on."""
    with blocked():
        return pool.submit(_call, item)


def _start(function: Callable[..., object], parent: int) -> None:
    global _function
    obey_only(parent)
    _function = function
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """Ends a worker whose parent is gone: a killed parent cannot stop its pool."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _call(item: object) -> object:
    assert _function is not None
    return _function(item)
