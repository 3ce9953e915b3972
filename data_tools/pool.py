"""A pool of processes for tools that work shard by shard."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

from mepa_ds.errors import UserError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_function: Callable[..., object] | None = None


def unordered_map(function: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int) -> Iterator[ResultT]:
    """Results as they come. `function` and what it is bound to pickle; 0 or 1 workers: in this process.

    Raises:
        UserError: the first that `function` raised.
    """
    if workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")  # no forks of a process that has threads
    with context.Pool(min(workers, len(items)), _start, (function, os.getpid())) as pool:
        for error, result in pool.imap_unordered(_call, items):
            if error is not None:
                raise UserError(error)
            yield cast(ResultT, result)


def _start(function: Callable[..., object], parent: int) -> None:
    global _function
    _function = function
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """A killed parent cannot stop its pool: workers look for themselves."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _call(item: object) -> tuple[str | None, object]:
    assert _function is not None
    try:
        return None, _function(item)
    except UserError as error:
        return str(error), None
