"""Derives a shard set from an image set: one shard for each shard, with the same keys in the same order.

Legend: B images of a batch, K views of an image, H and W of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mepa_ds import distributed, log
from mepa_ds.command_line.remote import RemoteSchemes
from mepa_ds.data.images import decode_sample
from mepa_ds.data.prefetch import ordered_map
from mepa_ds.data.remote.fetched_ahead import AHEAD
from mepa_ds.data.remote.schemes import allow
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import ShardIndex
from mepa_ds.data.shards.writer import Sample, ShardWriter, npy_bytes
from mepa_ds.data.views import Boxes
from mepa_ds.errors import UserError
from mepa_ds.machine import usable_cpus
from mepa_ds.progress import Progress

Pixels = npt.NDArray[np.uint8]
Prepare = Callable[[Image.Image, str], tuple[Pixels, Boxes | None]]
"""(RGB image, key) -> views (K, H, W, 3) and their boxes, if any."""
Encode = Callable[[Tensor], dict[str, Tensor]]
"""Images (B * K, 3, H, W) in [-1, 1] on the device -> arrays (B * K, ...) by extension."""


_DEFAULT_THREADS = min(usable_cpus(), 16)


@dataclass(frozen=True)
class RunOptions:
    """How the work is done. None of it changes what is written, except for rounding."""

    batch_size: int = 64
    """Pictures (images times views) in a forward pass."""
    workers: int = _DEFAULT_THREADS
    """Threads that decode images ahead; 0 decodes when a batch is needed."""
    num_parts: int = 1
    """Job array: split the shards into this many parts (under torchrun each part is split over the ranks)..."""
    part: int = 0
    """...and write this one (0-based). The part that finishes last writes index.json."""
    remote_schemes: RemoteSchemes = ()

    def check(self) -> None:
        """Raises UserError for numbers that make no sense. Notes the user's word on addresses."""
        allow(self.remote_schemes)
        for name, value, least in (("batch-size", self.batch_size, 1), ("workers", self.workers, 0)):
            if value < least:
                raise UserError(f"--{name}: expected at least {least}, got {value}")
        if not 0 <= self.part < self.num_parts:
            raise UserError(f"--part: expected 0 to {self.num_parts - 1}, got {self.part}")


@dataclass(frozen=True)
class Item:
    """One image, read and cut into views."""

    key: str
    members: dict[str, bytes]
    pixels_KHW3: Pixels
    boxes: Boxes | None


def open_images(directory: Path) -> ShardSet:
    """Raises UserError unless there is a set of images."""
    images = ShardSet(directory, "images")
    if images.index.kind != "images":
        raise UserError(f"images: {directory}: holds {images.index.kind}; give the image set they were made from")
    if len(images) == 0:
        raise UserError(f"images: {directory}: the set is empty")
    return images


def load_item(images: ShardSet, sample: int, prepare: Prepare) -> Item:
    """Raises DamagedError, naming the set and key, for an image that cannot be decoded."""
    key, members = images.read(sample)
    return Item(key, members, *prepare(decode_sample(images, key, members), key))


def stored_square(images: ShardSet) -> int:
    """The side of the first image; raises UserError unless it is a square."""
    item = load_item(images, 0, lambda image, _: (np.asarray(image)[None], None))
    height, width = item.pixels_KHW3.shape[1:3]
    if height != width:
        raise UserError(
            f"images: {images.directory}: the first image is {width} x {height} pixels, no square; give "
            "with --image-side the side of the square to cut from each image (256, as for VAR's tokens)"
        )
    return height


def to_device(items: list[Item], device: torch.device) -> Tensor:
    """(B * K, 3, H, W) float32 in [-1, 1]. Raises UserError for images of different sizes."""
    shapes = {item.pixels_KHW3.shape for item in items}
    if len(shapes) > 1:
        (_, *first, _), (_, *second, _) = sorted(shapes)[:2]
        raise UserError(
            f"images of different sizes ({first[0]} x {first[1]} and {second[0]} x {second[1]} pixels) cannot have "
            "feature maps of one shape; build the image shards with one --image-side, or use other --views"
        )
    pixels_NHW3 = torch.from_numpy(np.concatenate([item.pixels_KHW3 for item in items])).to(device)
    return pixels_NHW3.permute(0, 3, 1, 2).float().mul_(2 / 255).sub_(1)


def batches_of(
    images: ShardSet, samples: Iterable[int], prepare: Prepare, size: int, workers: int
) -> Iterator[list[Item]]:
    """The images of these samples in order, `size` at a time, decoded ahead by threads."""
    items = _items(images, samples, prepare, size, workers)
    while batch := list(islice(items, size)):
        yield batch


def _items(images: ShardSet, samples: Iterable[int], prepare: Prepare, size: int, workers: int) -> Iterator[Item]:
    depth = -(-2 * size // max(workers, 1))  # two batches ahead
    return ordered_map(lambda sample: load_item(images, sample, prepare), samples, workers, depth)


@dataclass(frozen=True)
class Derivation:
    """How the sample of a derived set is made from each image."""

    prepare: Prepare
    encode: Encode
    extras: Callable[[Item], dict[str, bytes]]
    """The members beside the encoded arrays: label and boxes."""
    views: int
    """K; 0 for a single view that is stored without an axis of views."""

    def samples(self, batch: list[Item], device: torch.device) -> Iterator[Sample]:
        """The encoded samples of one batch."""
        try:
            arrays = {ext: array.cpu() for ext, array in self.encode(to_device(batch, device)).items()}
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of GPU memory with {len(batch)} images at once; use a smaller --batch-size"
            ) from error
        for row, item in enumerate(batch):
            members = {}
            for ext, array in arrays.items():
                own = array[row] if self.views == 0 else array[row * self.views : (row + 1) * self.views]
                members[ext] = npy_bytes(own.numpy())
            yield item.key, {**members, **self.extras(item)}


def derive_set(
    images: ShardSet, writer: ShardWriter, derivation: Derivation, device: torch.device, options: RunOptions
) -> ShardIndex | None:
    """Writes this process's share of a set, and the index if the set is then complete.

    Shards that are there already are kept. A batch never spans two shards, so what is written does not depend on which
    shards were there.
    """
    launch = distributed.read_launch()
    worker, num_workers = options.part * launch.world_size + launch.rank, options.num_parts * launch.world_size
    names, sizes = writer.manifest.shard_names, images.shard_sizes
    ours = range(worker, len(names), num_workers)
    todo = [number for number in ours if not writer.is_complete(names[number])]
    if len(todo) < len(ours):
        log.say(
            f"{writer.directory}: {len(ours) - len(todo)} of {len(ours)} shards are there already, kept", flush=True
        )
    starts = np.cumsum([0, *sizes]).tolist()
    samples = chain.from_iterable(range(starts[number], starts[number + 1]) for number in todo)
    size = max(options.batch_size // max(derivation.views, 1), 1)
    items = _items(images, samples, derivation.prepare, size, options.workers)
    with Progress(
        total=sum(sizes[number] for number in todo),
        desc=writer.directory.name,
        unit="img",
        disable=not launch.is_main or not todo,
    ) as progress:
        for place, number in enumerate(todo):
            if images.cache is not None:
                images.cache.prefetch(todo[place : place + 1 + AHEAD])
            shard = _shard_samples(islice(items, sizes[number]), derivation, device, size, progress)
            writer.write_shard(names[number], shard)
    return writer.finish()


def _shard_samples(
    items: Iterator[Item], derivation: Derivation, device: torch.device, size: int, progress: Progress
) -> Iterator[Sample]:
    while batch := list(islice(items, size)):
        yield from derivation.samples(batch, device)
        progress.update(len(batch))
