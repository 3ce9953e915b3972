"""Streams of tasks that tell the caches of remote sets which shards come next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mepa_ds.data.order import BatchTask, SampleOrder, WindowWatch
from mepa_ds.data.remote.shard_cache import ShardCache

AHEAD = 2
"""Shards that are fetched before they are needed, where they are read one after the other."""


def fetched_ahead(tasks: Iterator[BatchTask], order: SampleOrder, caches: Sequence[ShardCache]) -> Iterator[BatchTask]:
    """Passes tasks on; tells the caches when the stream comes to another window of shards."""
    watch = WindowWatch(order)
    for task in tasks:
        if caches and (shards := watch.needed(int(task.positions[-1]))) is not None:
            for cache in caches:
                cache.prefetch(shards)
        yield task


def fetched_in_order(
    tasks: Iterator[BatchTask], shard_sizes: Sequence[int], caches: Sequence[ShardCache]
) -> Iterator[BatchTask]:
    """The same for a single pass: positions are sample numbers."""
    ends, current = np.cumsum(shard_sizes), -1
    for task in tasks:
        shard = int(np.searchsorted(ends, task.positions[-1], side="right"))
        if caches and shard != current:
            for cache in caches:
                cache.prefetch(range(shard, min(shard + 1 + AHEAD, len(ends))))
            current = shard
        yield task
