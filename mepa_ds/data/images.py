"""Batches of images from shards: decode, resize, crop; the same at any number of workers and ranks.

Legend: B batch of this rank, H = W image side.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mepa_ds.data.options import DEFAULTS, LoaderOptions, takes_old_keywords
from mepa_ds.data.order import BatchTask, OrderedStream, SampleOrder, rank_batches
from mepa_ds.data.remote.fetched_ahead import fetched_ahead, fetched_in_order
from mepa_ds.data.remote.shard_cache import ShardCache
from mepa_ds.data.shard_set import ShardSet, parse_label, spread
from mepa_ds.data.shards.damaged import OnDamaged, first_readable
from mepa_ds.data.shards.samples import IMAGE_EXTENSIONS, LABEL_EXTENSION, image_extension
from mepa_ds.distributed import ALONE, Ranks, read_launch, uses_gpu
from mepa_ds.errors import UserError
from mepa_ds.images.decoding import decode_image
from mepa_ds.images.resizing import fit_image
from mepa_ds.interrupts import obey_only
from mepa_ds.log import note
from mepa_ds.machine import usable_cpus

_END_SECONDS = 1.0  # how long a worker process may take to end once its connection is broken


@dataclass(frozen=True)
class ImageBatch:
    """Images of one rank's slice of a global batch."""

    pixels_B3HW: Tensor
    """uint8: the form in which images travel between processes and to the GPU."""
    labels_B: Tensor
    """int64; -1 where the set has no labels."""
    keys: tuple[str, ...]
    next_position: int
    """Position in the sample stream after this global batch: where a resumed run continues."""
    damaged: tuple[str, ...] = ()
    """What was wrong with samples that were replaced (on_damaged="skip"), one message each."""

    @property
    def images_B3HW(self) -> Tensor:
        """float32 in [-1, 1], on the device of the pixels."""
        return self.pixels_B3HW.float().mul_(2 / 255).sub_(1)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ImageBatch:
        return replace(
            self,
            pixels_B3HW=self.pixels_B3HW.to(device, non_blocking=non_blocking),
            labels_B=self.labels_B.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> ImageBatch:
        return replace(self, pixels_B3HW=self.pixels_B3HW.pin_memory(), labels_B=self.labels_B.pin_memory())


def uniform_pair(seed: int, position: int) -> tuple[float, float]:
    """Two numbers in [0, 1), a pure function of the arguments (raw Philox output is stable between versions)."""
    bits = np.random.Philox(key=seed, counter=position).random_raw(2)
    first, second = (int(bit) >> 11 for bit in bits)
    return first / 2**53, second / 2**53


def image_member(members: dict[str, bytes], where: str) -> tuple[str, bytes]:
    """(extension, bytes) of the image among a sample's members."""
    extension = image_extension(members, where)
    return extension, members[extension]


def where_of(shards: ShardSet, key: str) -> str:
    """Names a sample in messages."""
    return f"{shards.what}: {shards.directory}: sample {key!r}"


def decode_sample(shards: ShardSet, key: str, members: dict[str, bytes]) -> Image.Image:
    """The image of a sample. Raises DamagedError, which names set and key."""
    where = where_of(shards, key)
    remedy = (
        f"make a set without it: mepa data build webdataset --shards {shards.directory} --out NEW --on-damaged skip"
    )
    return decode_image(image_member(members, where)[1], where, remedy=remedy)


class _ImageDataset(Dataset[Any]):
    """Reads whole batches. An error is returned, not raised, so that it reaches the main process unchanged."""

    def __init__(self, shards: ShardSet, stream: OrderedStream | None, side: int, seed: int, on_damaged: OnDamaged):
        self._shards, self._stream, self._side = shards, stream, side
        self._seed, self._on_damaged = seed, on_damaged

    def __getitem__(self, task: BatchTask) -> ImageBatch | UserError:
        pixels_B3HW = torch.empty(len(task.positions), 3, self._side, self._side, dtype=torch.uint8)
        labels, keys, damaged = [], [], list[str]()
        try:
            for row, position in enumerate(task.positions.tolist()):
                key, label, image = self._read(position, damaged)
                pixels_B3HW[row] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
                labels.append(label)
                keys.append(key)
        except UserError as error:  # also raised for a full disk under a shard cache
            return error
        labels_B = torch.tensor(labels, dtype=torch.int64)
        return ImageBatch(pixels_B3HW, labels_B, tuple(keys), task.next_position, tuple(damaged))

    def _read(self, position: int, damaged: list[str]) -> tuple[str, int, Image.Image]:
        """The sample at a position, or the next one of the stream that is whole."""
        if self._on_damaged == "stop" or self._stream is None:
            return self._read_one(position, position)
        found, errors = first_readable(
            lambda step: self._read_one(position + step, position), len(self._shards), self._shards.directory
        )
        damaged += errors
        return found

    def _read_one(self, position: int, crop_position: int) -> tuple[str, int, Image.Image]:
        sample, at = position, (0.5, 0.5)
        if self._stream is not None:
            sample = int(self._stream.samples_at(np.array([position]))[0])
            at = uniform_pair(self._seed, crop_position)
        key, members = self._shards.read(sample)
        image = fit_image(decode_sample(self._shards, key, members), self._side, at)
        if LABEL_EXTENSION not in members:
            return key, -1, image
        return (
            key,
            parse_label(members[LABEL_EXTENSION], len(self._shards.index.classes), lambda: where_of(self._shards, key)),
            image,
        )


def image_batches(
    shards: Path,
    *,
    batch_size: int,
    image_side: int,
    seed: int = 0,
    position: int = 0,
    ranks: Ranks = ALONE,
    options: LoaderOptions = DEFAULTS,
) -> Iterator[ImageBatch]:
    """This rank's share of an endless shuffled stream of images (mepa_ds.data.order), for training.

    VAR's random crop: the shorter side is resized to 1.125 x `image_side`, then cropped at random; no flip. Which crop
    is a pure function of (seed, position).

    Args:
        shards: an image set.
        batch_size: of this rank.
        image_side: pixels; images that are that size already are neither resized nor cropped.
        position: position in the sample stream to start at (`ImageBatch.next_position`).
        options: on_damaged="skip" takes the next readable sample of the stream in place of a damaged one.

    Raises:
        UserError: no such set, it has no images, or a damaged sample under "stop".
    """
    opened = _open_images(shards)
    order = SampleOrder(opened.shard_sizes, seed, opened.window, options.unique_images)
    tasks = rank_batches(position, batch_size * ranks.world_size, *ranks)
    dataset = _ImageDataset(opened, OrderedStream(order), image_side, seed, options.on_damaged)
    return _run(dataset, fetched_ahead(tasks, order, _caches(opened)), options.num_workers)


def images_once(
    shards: Path, *, batch_size: int, image_side: int, ranks: Ranks = ALONE, num_workers: int = 0
) -> Iterator[ImageBatch]:
    """One pass over an image set, centre-cropped, for evaluation.

    Rank r has the samples r, r + W, ... in order. Its last batch may be short, and a rank may have one batch fewer than
    another.

    Raises:
        UserError: no such set, it has no images, or a damaged sample.
    """
    opened = _open_images(shards)
    tasks = _single_pass_tasks(len(opened), batch_size, *ranks)
    tasks = fetched_in_order(tasks, opened.shard_sizes, _caches(opened))
    return _run(_ImageDataset(opened, None, image_side, 0, "stop"), tasks, num_workers)


def evenly(batches: Iterator[ImageBatch], there: int, count: int) -> Iterator[ImageBatch]:
    """`count` of the `there` images of a pass, evenly over it; batches may get shorter."""
    chosen_N = np.array(spread(there, count), np.int64)
    first = 0
    for batch in batches:
        rows = chosen_N[(chosen_N >= first) & (chosen_N < first + len(batch.keys))] - first
        first += len(batch.keys)
        if len(rows) == len(batch.keys):
            yield batch
        elif len(rows):
            keys = tuple(batch.keys[row] for row in rows)
            yield replace(batch, pixels_B3HW=batch.pixels_B3HW[rows], labels_B=batch.labels_B[rows], keys=keys)


image_batches = takes_old_keywords(image_batches, single_pass=images_once)


def _open_images(shards: Path) -> ShardSet:
    opened = ShardSet(shards, "images")
    if not set(IMAGE_EXTENSIONS) & opened.index.members.keys():
        raise UserError(f"images: {shards}: holds {sorted(opened.index.members)}, no images; give the image set")
    return opened


def _caches(opened: ShardSet) -> list[ShardCache]:
    return [opened.cache] if opened.cache else []


def _run(dataset: _ImageDataset, tasks: Iterator[BatchTask], num_workers: int) -> Iterator[ImageBatch]:
    _note_few_cpus(num_workers)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_Tasks(tasks),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=uses_gpu(),
        worker_init_fn=_leave_signals_to_the_rank,
    )
    on_child, others = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
    try:
        batches = iter(loader)
    except OSError as error:
        raise UserError(
            f"{num_workers} processes that decode images cannot be started ({error.strerror}); use fewer "
            "data.num_workers, or give the job more memory"
        ) from error
    if on_child is not None and threading.current_thread() is threading.main_thread():
        # When a worker dies, PyTorch's handler raises an error wherever the rank is at that moment. Without the handler
        # the loader notices the death when it is next asked for a batch.
        signal.signal(signal.SIGCHLD, on_child)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (OSError, EOFError, RuntimeError) as error:  # a bug in a worker raises these too; the worker then lives on
        wait([worker.sentinel for worker in workers], timeout=_END_SECONDS)
        codes = [worker.exitcode for worker in workers if worker.exitcode is not None]
        if not codes:
            raise
        raise UserError(
            f"a worker process that decodes images {_how_it_ended(codes[0])}; use fewer data.num_workers, or give the "
            "job more memory"
        ) from error
    finally:
        del batches  # ends the workers now, and not only when the error is garbage-collected


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended by itself with status {code}"
    name = signal.Signals(-code).name
    lacking = "room in /dev/shm" if name == "SIGBUS" else "memory"
    return f"was killed ({name}), perhaps for want of {lacking}"


@functools.cache
def _note_few_cpus(num_workers: int) -> None:
    """Says once that the workers of a rank have few CPUs. PyTorch warns at every loader, without regard to quotas."""
    warnings.filterwarnings("ignore", "This DataLoader will create")
    if num_workers > (cpus := usable_cpus()) and read_launch().is_main:
        note(f"warning: data.num_workers: {num_workers} processes of a rank share {cpus} CPUs; {cpus} would do as well")


def _leave_signals_to_the_rank(worker: int) -> None:
    """Makes a worker survive a signal to all processes: if it ended, its rank would crash before it has saved."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    assert rank.pid is not None
    signal.set_wakeup_fd(-1)  # otherwise a forked worker would write signals into the rank's socket
    obey_only(rank.pid)


class _Tasks:
    """Stands in for DataLoader's sampler, which may be anything iterable."""

    def __init__(self, tasks: Iterator[BatchTask]):
        self._tasks = tasks

    def __iter__(self) -> Iterator[BatchTask]:
        return self._tasks


def _single_pass_tasks(num_samples: int, batch_size: int, rank: int, world_size: int) -> Iterator[BatchTask]:
    samples = np.arange(rank, num_samples, world_size, dtype=np.int64)
    for start in range(0, len(samples), batch_size):
        share = samples[start : start + batch_size]
        yield BatchTask(share, int(share[-1]) + 1)
