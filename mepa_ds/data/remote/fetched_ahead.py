"""Passes batch tasks on and tells the caches of remote sets which shards come next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mepa_ds.data.order import BatchTask, SampleOrder, WindowWatch
from mepa_ds.data.remote.shard_cache import ShardCache

AHEAD = 2
"""How many shards are fetched ahead of the current one when a set is read from its first shard to its last."""


def fetched_ahead(tasks: Iterator[BatchTask], order: SampleOrder, caches: Sequence[ShardCache]) -> Iterator[BatchTask]:
    """Passes tasks on, and tells the caches when the sample stream comes to another window of shards."""
    watch = WindowWatch(order)
    for task in tasks:
        if caches and (shards := watch.needed(int(task.positions[-1]))) is not None:
            for cache in caches:
                cache.prefetch(shards)
        yield task


def fetched_in_order(
    tasks: Iterator[BatchTask], shard_sizes: Sequence[int], caches: Sequence[ShardCache]
) -> Iterator[BatchTask]:
    """Does the same for a single pass through the set, where positions are sample numbers."""
    ends, current = np.cumsum(shard_sizes), -1
    for task in tasks:
        shard = int(np.searchsorted(ends, task.positions[-1], side="right"))
        if caches and shard != current:
            for cache in caches:
                cache.prefetch(range(shard, min(shard + 1 + AHEAD, len(ends))))
            current = shard
        yield task
