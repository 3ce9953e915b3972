"""The order of samples as a pure function of (seed, epoch, shard sizes, window of shards, size of the subset).

The training stream is endless: position p = 0, 1, 2, ... lies in epoch p // N at offset p % N, and the sample at
position p is `permutation(seed, p // N)[p % N]`.

Global batch s of size G is the positions [sG, (s + 1)G); of it, rank r of W takes the contiguous slice of G / W
positions that starts at sG + rG / W. From this alone follows what resuming needs:

- Each sample exactly once an epoch. The positions of epoch e are [eN, (e + 1)N); offsets run through 0..N-1 once
  and a permutation is a bijection. Batches tile the positions without gap or overlap, and the slices of the ranks
  tile each batch. So each position is read exactly once, at any batch size and by any readers.
- Independent of world size, workers and timing. The positions of a global batch are [sG, (s + 1)G) for every W,
  and which sample stands at a position involves neither W nor the worker that reads it.
- The same number of batches on every rank: all have one slice of each global batch. An epoch's end inside a batch
  is nothing special, since the stream runs on; so nothing is dropped when G does not divide N.
- The state is one integer: the first position not yet consumed. A run may stop at any batch and continue there
  with other W, G or workers: the positions before are consumed, those after are not. Seed, shards and window must be
  the same: a run's checkpoint names them (mepa_ds.pretrain.data.data_identity), and refuses others.

Sets that are fetched have a window of shards: the shards are permuted and cut into windows of that many, and samples
are permuted within each window. That too is a bijection of the epoch's N samples, so all of the above holds. Only the
shuffle is less uniform; `shuffle_quality` measures by how much.

A run on a subset of n samples draws it once: the first n of a permutation of the whole set (`subset_of`), so a smaller
subset lies within a larger one of the same seed. N is n then, and the rest holds as above: the epoch's order is a
permutation of the subset. A subset of the whole set is the whole set, in the same order.

Permutations are made from the raw output of the Philox generator, keyed through SeedSequence, by a stable sort of
one 64-bit number a sample. NumPy promises the streams of bit generators and of SeedSequence to be stable between
versions (NEP 19), which it does not promise of `Generator.permutation`.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mepa_ds.errors import UserError

Indices = NDArray[np.int64]
_SUBSET = 2**31  # the stream that the subset is drawn from: windows, which have streams 2, 3, ..., are never that many


def permutation(seed: int, epoch: int, size: int, stream: int = 0) -> Indices:
    """A uniform permutation of range(size), a pure function of its arguments."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, stream])).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


@functools.lru_cache(maxsize=4)
def subset_of(seed: int, total: int, size: int) -> Indices:
    """(size,) ascending sample numbers: a uniform subset of range(total), within every larger one of the same seed."""
    chosen = np.sort(permutation(seed, 0, total, stream=_SUBSET)[:size])
    chosen.setflags(write=False)  # shared by all callers
    return chosen


@dataclass(frozen=True)
class SampleOrder:
    """Says which sample of a set stands at each position of the endless sample stream.

    Args:
        shard_sizes: samples of each shard; N is their sum.
        seed: not negative.
        window: None for a permutation of the whole set (local files). A number of shards for sets that are fetched:
            shards are permuted, cut into windows of that many, and samples are permuted within each window, so that
            only the shards of one window need to be at hand at a time.
        subset: the number of samples that are used at all, drawn once; None: all. Not with a window.
    """

    shard_sizes: tuple[int, ...]
    seed: int
    window: int | None = None
    subset: int | None = None

    def __post_init__(self) -> None:
        total = sum(self.shard_sizes)
        if total == 0:
            raise UserError("the shard set is empty; make it again")
        if self.seed < 0:
            raise UserError(f"seed: expected a number of at least 0, got {self.seed}")
        if self.window is not None and self.window < 1:
            raise UserError(f"window: expected at least 1 shard, got {self.window}")
        if self.subset is not None and not 1 <= self.subset <= total:
            raise UserError(f"subset: expected 1 to {total}, the samples of the set, got {self.subset}")
        if self.subset is not None and self.window is not None:
            raise UserError("subset: a set that is fetched, window by window, is read whole; copy it, or use all of it")

    @property
    def num_samples(self) -> int:
        """N."""
        return sum(self.shard_sizes) if self.subset is None else self.subset

    def epoch(self, epoch: int) -> Indices:
        """(N,) the set's sample numbers in the order of an epoch."""
        if self.window is None:
            places = permutation(self.seed, epoch, self.num_samples)
            if self.subset is None:
                return places
            return subset_of(self.seed, sum(self.shard_sizes), self.subset)[places]
        starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        parts = []
        for number, shards in enumerate(self.windows(epoch)):
            members = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
            parts.append(members[permutation(self.seed, epoch, len(members), stream=2 + number)])
        return np.concatenate(parts).astype(np.int64, copy=False)

    def windows(self, epoch: int) -> list[list[int]]:
        """The shards of each window of an epoch, in the order of use. One window of all shards if there are none."""
        shards = permutation(self.seed, epoch, len(self.shard_sizes), stream=1).tolist()
        size = self.window or len(shards)
        return [shards[start : start + size] for start in range(0, len(shards), size)]


class WindowWatch:
    """Says, as positions go by, which shards are needed now and next."""

    def __init__(self, order: SampleOrder):
        self._order = order
        self._epoch, self._ends, self._current = -1, np.empty(0, np.int64), (-1, -1)

    def needed(self, position: int) -> list[int] | None:
        """Shards of the window at a position and of the next one; None while the window is the last call's."""
        epoch, offset = divmod(position, self._order.num_samples)
        if epoch != self._epoch:
            sizes = [sum(self._order.shard_sizes[s] for s in shards) for shards in self._order.windows(epoch)]
            self._epoch, self._ends = epoch, np.cumsum(sizes)
        number = int(np.searchsorted(self._ends, offset, side="right"))
        if self._current == (epoch, number):
            return None
        self._current = (epoch, number)
        windows = self._order.windows(epoch) + self._order.windows(epoch + 1)[:1]
        return windows[number] + windows[number + 1]


class OrderedStream:
    """Looks positions up in a `SampleOrder`, keeping the permutations of two epochs at hand. Threads may share it."""

    def __init__(self, order: SampleOrder):
        self._order, self._epochs, self._lock = order, dict[int, Indices](), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_order": self._order, "_epochs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def samples_at(self, positions: Indices) -> Indices:
        """Sample numbers of stream positions, both (B,) int64."""
        epochs, offsets = np.divmod(positions, self._order.num_samples)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            samples[here] = self._epoch(epoch)[offsets[here]]
        return samples

    def _epoch(self, epoch: int) -> Indices:
        with self._lock:
            if epoch not in self._epochs:
                if len(self._epochs) >= 2:
                    del self._epochs[min(self._epochs)]
                self._epochs[epoch] = self._order.epoch(epoch)
            return self._epochs[epoch]


@dataclass(frozen=True)
class BatchTask:
    """One rank's slice of a global batch, before it is read."""

    positions: Indices
    """(B,) stream positions."""
    next_position: int
    """The first position after the global batch."""


def rank_batches(
    position: int, global_batch: int, rank: int, world_size: int, last: int | None = None
) -> Iterator[BatchTask]:
    """This rank's slice of each global batch from `position` on; endless unless `last` bounds the stream.

    Raises:
        UserError: the global batch does not divide among the ranks.
    """
    if global_batch < 1 or global_batch % world_size:
        raise UserError(
            f"global batch {global_batch} does not divide among {world_size} ranks; make it a multiple of {world_size}"
        )
    if position < 0:
        raise UserError(f"position: expected at least 0, got {position}")
    share = global_batch // world_size
    batch_starts = itertools.count(position, global_batch) if last is None else range(position, last, global_batch)
    for_rank = (start + rank * share for start in batch_starts)
    return (
        BatchTask(np.arange(start, start + share, dtype=np.int64), start - rank * share + global_batch)
        for start in for_rank
    )


def shuffle_quality(samples: Indices, shard_of_sample: Sequence[int] | Indices, batch_size: int) -> dict[str, float]:
    """How near an epoch's order comes to a uniform permutation: 1.0 is what a uniform one has on average.

    Args:
        samples: (N,) one epoch, as `SampleOrder.epoch` gives it.
        shard_of_sample: (N,) the shard of each sample number.

    Returns:
        `displacement`: mean distance between a sample's place and its number, over the uniform N/3.
        `shards_in_batch`: distinct shards in a batch, over the number expected of a uniform order.
    """
    size = len(samples)
    displacement = np.abs(samples - np.arange(size)).mean() / ((size * size - 1) / (3 * size))
    shards = np.asarray(shard_of_sample)[samples]
    full = shards[: size // batch_size * batch_size].reshape(-1, batch_size)
    distinct = np.mean([len(np.unique(batch)) for batch in full])
    counts = np.bincount(shards)
    # A shard of n samples is absent from a batch of B with probability C(N - n, B) / C(N, B).
    drawn = np.arange(batch_size)
    absent = np.array([np.prod(np.clip(size - n - drawn, 0, None) / (size - drawn)) for n in counts])
    return {"displacement": float(displacement), "shards_in_batch": float(distinct / (1 - absent).sum())}
