"""What a run asks of the file system: files opened, bytes read, looks at metadata, by the loader and by checkpoints.

The numbers are those of this project's code, call by call: tests count the real calls of a few ranks. The page cache of
a node, which saves bytes but no opens, is left out.

    loader       each rank opens index.json of a set, after 6 looks at what is there; of each shard that it meets it
                 opens the offset index (2 looks), reads it whole, and opens the tar (2 looks)
    checkpoint   each rank writes one file and opens it again for its digest; the main rank looks twice at each file,
                 and writes the table of contents, run.json and manifest.json in 12 opens
    resuming     each rank opens manifest.json, run.json, the table of contents, one file for its digest and its own to
                 read it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.order import SampleOrder
from mepa_ds.data.shards.index import INDEX_NAME, ShardIndex

LOOKS_A_SET, LOOKS_A_SHARD = 6, 4
_OFFSET_BYTES, _OFFSET_FILE_BYTES = 64, 2700
"""Of a sample in an offset index (key, label, offset and size of each member); of the file beside these."""
_ENTRY_BYTES = 330
"""Of a shard in index.json."""


@dataclass(frozen=True)
class FileWork:
    """Sums over all ranks."""

    opened: int
    looked_at: int
    """stat and the like."""
    bytes: float
    open_at_once: int = 0
    """Files that one rank keeps open."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def shard_sizes(config: PretrainConfig, num_images: int = 1_281_167, shard_samples: int = 1000) -> tuple[int, ...]:
    """Returns the images of each shard of data.tokens; of ImageNet's shards if the set is not there."""
    tokens = config.data.tokens
    if tokens is not None and (tokens / INDEX_NAME).exists():
        return tuple(shard.num_samples for shard in ShardIndex.read(tokens).shards)
    full, rest = divmod(num_images, shard_samples)
    return (shard_samples,) * full + ((rest,) if rest else ())


def loader_files(
    sizes: Sequence[int], num_sets: int, sample_bytes: float, world_size: int, global_batch: int, seed: int = 0
) -> FileWork:
    """Returns what all ranks do in the first epoch, in which every rank meets its shards for the first time.

    Args:
        sizes: images of each shard.
        num_sets: sets that are read side by side (tokens, features).
        sample_bytes: bytes of an image in all sets.
    """
    order = SampleOrder(tuple(sizes), seed)
    samples_N = order.epoch(0)
    shard_N = np.searchsorted(np.cumsum(sizes), samples_N, side="right")
    rank_N = np.arange(len(samples_N)) % global_batch // (global_batch // world_size)
    pairs = np.unique(rank_N * len(sizes) + shard_N)  # each rank opens each of its shards once
    most = int(np.bincount(pairs // len(sizes)).max())
    indices = (
        float(np.take(np.asarray(sizes), pairs % len(sizes)).sum()) * _OFFSET_BYTES + len(pairs) * _OFFSET_FILE_BYTES
    )
    tables = world_size * len(sizes) * _ENTRY_BYTES
    return FileWork(
        opened=num_sets * (world_size + 2 * len(pairs)),
        looked_at=num_sets * (LOOKS_A_SET * world_size + LOOKS_A_SHARD * len(pairs)),
        bytes=num_sets * (indices + tables) + len(samples_N) * sample_bytes,
        open_at_once=num_sets * most,
    )


def checkpoint_files(world_size: int, size: float) -> FileWork:
    """Returns what all ranks do to write a checkpoint of `size` bytes, and to read it again for the digests."""
    return FileWork(opened=2 * world_size + 12, looked_at=2 * world_size, bytes=2 * size)


def resume_files(world_size: int, size: float) -> FileWork:
    """Returns what all ranks do to resume on as many ranks: they check all files, and each reads its own."""
    return FileWork(opened=5 * world_size + 2, looked_at=world_size + 2, bytes=2 * size)
