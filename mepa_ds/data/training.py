"""The training loader: precomputed token maps and teacher features, joined by position, ready for the model.

Legend: B batch of this rank, L tokens over all scales, N teacher patches, C teacher width, X stored width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mepa_ds.data.codecs import FEATURES_EXT, SCALE_EXT, FeatureDecoder
from mepa_ds.data.options import DEFAULTS, LoaderOptions, takes_old_keywords
from mepa_ds.data.order import BatchTask, Indices, OrderedStream, SampleOrder, rank_batches
from mepa_ds.data.prefetch import BufferPool, ordered_map
from mepa_ds.data.remote.fetched_ahead import fetched_ahead, fetched_in_order
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.damaged import first_readable
from mepa_ds.data.training_sets import TOKENS_EXT, TrainingSets, open_training_sets
from mepa_ds.data.views import BOX_EXT, choose_views, sample_boxes
from mepa_ds.distributed import ALONE, Ranks
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.machine import copied_to


@dataclass(frozen=True)
class TrainingBatch:
    """This rank's slice of a global batch. Features travel as they are stored and are decoded where they lie."""

    tokens_BL: Tensor
    """int64 codes, scale after scale."""
    labels_B: Tensor
    """int64 class."""
    weight_B: Tensor
    """float32: 1, or 0 for a sample that only fills up a last evaluation batch."""
    positions_B: Tensor
    """int64 positions in the sample stream (sample numbers in evaluation)."""
    keys: tuple[str, ...]
    next_position: int
    """Position in the sample stream after this global batch: where a resumed run continues."""
    stored_features: dict[str, Tensor] = field(default_factory=dict)
    """Members of the feature codec by extension, batched."""
    decoder: FeatureDecoder | None = None
    whole_map_grid_side: int | None = None
    """Side of the grid to read at the boxes of the views, when features are maps of whole images; else None."""
    damaged: tuple[str, ...] = ()
    """What was wrong with samples that were replaced (on_damaged="skip"), one message each."""

    @property
    def features_BNC(self) -> Tensor | None:
        """float32 teacher features, decoded on the device that the batch is on; None without a feature set."""
        if self.decoder is None:
            return None
        stored = self.stored_features[FEATURES_EXT]
        features = self.decoder.to(stored.device)(stored, self.stored_features.get(SCALE_EXT))
        if self.whole_map_grid_side is None:
            return features
        return sample_boxes(features, self.stored_features[BOX_EXT], self.whole_map_grid_side)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TrainingBatch:
        def move(tensor: Tensor) -> Tensor:
            return copied_to(tensor, torch.device(device), non_blocking)

        return replace(
            self,
            tokens_BL=move(self.tokens_BL),
            labels_B=move(self.labels_B),
            weight_B=move(self.weight_B),
            positions_B=move(self.positions_B),
            stored_features={extension: move(tensor) for extension, tensor in self.stored_features.items()},
        )


class _Reader:
    """Turns one rank's positions into a batch. Called from several threads."""

    def __init__(
        self,
        sets: TrainingSets,
        stream: OrderedStream | None,
        seed: int,
        options: LoaderOptions,
    ):
        self._sets, self._stream, self._seed = sets, stream, seed
        self._on_damaged, self._num_classes = options.on_damaged, options.num_classes
        # In a single pass, places beyond the last sample are filled with the last sample, at weight 0.
        self._last = sets.num_samples - 1 if stream is None else None
        self._buffers = BufferPool(options.pin_memory)
        whole = sets.whole_maps
        # (set, extension, dimensions of one view): a member with one dimension more holds several views.
        self._arrays = [(sets.tokens, TOKENS_EXT, 1)]
        self._may_be_negative = not str(sets.tokens.index.members[TOKENS_EXT].dtype).startswith("u")
        if sets.features is not None:
            self._arrays.append((sets.features, FEATURES_EXT, 3 if whole else 2))
            if SCALE_EXT in sets.features.index.members:
                self._arrays.append((sets.features, SCALE_EXT, 2 if whole else 1))
        if whole:
            self._arrays.append((sets.tokens, BOX_EXT, 1))

    def __call__(self, task: BatchTask) -> TrainingBatch:
        positions = task.positions
        if self._last is not None:
            positions = np.minimum(positions, self._last)
        samples, errors = self._samples(positions), list[str]()
        try:
            batch = self._read(samples, positions)
        except DamagedError:
            if self._on_damaged == "stop":
                raise
            batch, errors = self._read_whole(samples, task.positions, positions)
        batch.weight_B[torch.from_numpy(task.positions != positions)] = 0
        return replace(batch, next_position=task.next_position, damaged=tuple(errors))

    def _read_whole(self, samples: Indices, places: Indices, positions: Indices) -> tuple[TrainingBatch, list[str]]:
        """The batch with its damaged samples replaced, and what was wrong with these."""
        found = [self._whole(position) for position in positions.tolist()]
        whole = np.array([sample for sample, _ in found])
        batch = self._read(whole, positions)
        if self._stream is not None:
            return batch, [error for _, errors in found for error in errors]
        # In evaluation a sample that stands in for another does not count, and each damaged sample is named once.
        batch.weight_B[torch.from_numpy(whole != samples)] = 0
        own = [errors[:1] for place, at, (_, errors) in zip(places, positions, found, strict=True) if place == at]
        return batch, [error for errors in own for error in errors]

    def _samples(self, positions: Indices) -> Indices:
        return positions if self._stream is None else self._stream.samples_at(positions)

    def _whole(self, position: int) -> tuple[int, list[str]]:
        """The sample at a position, or the next readable one of the stream; and what was wrong with those before it."""

        def read(step: int) -> int:
            at = np.array([position + step])
            if self._stream is None:
                at %= self._sets.num_samples
            sample = self._samples(at)
            self._read(sample, np.array([position]))  # with the view of the position that it would fill
            return int(sample[0])

        return first_readable(read, self._sets.num_samples, self._sets.tokens.directory)

    def _read(self, samples: Indices, positions: Indices) -> TrainingBatch:
        tokens = self._sets.tokens
        keys = tokens.keys(samples)
        stored = {array[1]: self._array(*array, samples, positions) for array in self._arrays}
        codes_BL = stored.pop(TOKENS_EXT)
        tokens_BL = self._buffers.empty(tuple(codes_BL.shape), torch.int64)
        tokens_BL.copy_(codes_BL)
        self._check_codes(tokens_BL, keys)
        labels_B = torch.from_numpy(tokens.read_labels(samples))
        check_labels(labels_B, self._num_classes, lambda row: f"{tokens.directory}: sample {keys[row].decode()!r}")
        return TrainingBatch(
            tokens_BL=tokens_BL,
            labels_B=labels_B,
            weight_B=torch.ones(len(samples)),
            positions_B=torch.from_numpy(positions),
            keys=tuple(key.decode() for key in keys),
            next_position=0,
            stored_features=stored,
            decoder=self._sets.decoder,
            whole_map_grid_side=self._sets.feature_grid_side if self._sets.whole_maps else None,
        )

    def _array(self, shards: ShardSet, extension: str, dimensions: int, samples: Indices, positions: Indices) -> Tensor:
        member = shards.index.members[extension]
        assert member.shape is not None
        shape, views = member.shape, None
        if len(shape) == dimensions + 1:
            num_views, shape = shape[0], shape[1:]
            views = np.zeros_like(positions)
            if self._stream is not None:
                views = choose_views(self._seed, positions, num_views)
        shards.look_up(samples)  # memory is taken for arrays that are there
        tensor = self._buffers.empty((len(samples), *shape), getattr(torch, str(member.dtype)))
        shards.read_arrays(samples, extension, tensor.numpy(), views)
        return tensor

    def _check_codes(self, tokens_BL: Tensor, keys: list[bytes]) -> None:
        over_B = tokens_BL.amax(dim=1) >= self._sets.codebook_size
        if self._may_be_negative:
            over_B |= tokens_BL.amin(dim=1) < 0
        if over_B.any():
            key = keys[int(over_B.nonzero()[0])].decode()
            raise DamagedError(
                f"{self._sets.tokens.directory}: sample {key!r} has codes outside the codebook of "
                f"{self._sets.codebook_size}; run mepa data verify"
            )


def check_labels(labels_B: Tensor, num_classes: int | None, where: Callable[[int], str]) -> None:
    """Raises UserError unless all labels are in range(num_classes); None: any. `where` names the sample of a row.

    The error is no DamagedError, which could be skipped: the model is too small for the set, or the set is a wrong one.
    """
    if num_classes is None:
        return
    wrong_B = (labels_B < 0) | (labels_B >= num_classes)
    if wrong_B.any():
        row = int(wrong_B.nonzero()[0])
        raise UserError(
            f"{where(row)} has label {int(labels_B[row])}, but the model's classes are 0 to {num_classes - 1}; "
            "set model.num_classes to the data's number of classes, or make the set again with right labels"
        )


@takes_old_keywords
def training_batches(
    tokens: Path,
    features: Path | None,
    *,
    global_batch: int,
    seed: int,
    position: int = 0,
    ranks: Ranks = ALONE,
    options: LoaderOptions = DEFAULTS,
) -> Iterator[TrainingBatch]:
    """The endless training stream from `position` on: this rank's share of each global batch.

    Order, views and batches are pure functions of (seed, position): see mepa_ds.data.order for what that gives.

    Args:
        tokens: token set; features: feature set of the same images, or None.
        global_batch: samples a step over all ranks, a multiple of their number.
        position: `TrainingBatch.next_position` of the last batch that a resumed run had consumed.
        options: with on_damaged="skip" the next readable sample of the stream takes a damaged one's place, the same
            one on any number of ranks.

    Raises:
        UserError: see `open_training_sets`; a global batch that does not divide; more unique images than the set has,
            or any of a set that is fetched; a damaged sample under "stop"; a label that the model has no class for.
    """
    sets = open_training_sets(tokens, features)
    order = SampleOrder(sets.tokens.shard_sizes, seed, sets.window, options.unique_images)
    reader = _Reader(sets, OrderedStream(order), seed, options)
    tasks = rank_batches(position, global_batch, *ranks)
    return ordered_map(reader, fetched_ahead(tasks, order, sets.caches), options.num_workers)


@takes_old_keywords
def evaluation_batches(
    tokens: Path,
    features: Path | None,
    *,
    batch_size: int,
    ranks: Ranks = ALONE,
    options: LoaderOptions = DEFAULTS,
) -> Iterator[TrainingBatch]:
    """One pass in order, each sample once over the ranks; every rank has the same number of batches of `batch_size`.

    Places that are left over in the last batches hold the last sample again, with `weight_B` 0. Sums that are weighted
    by it and reduced over the ranks are therefore exact. Under on_damaged="skip" the places of damaged samples also
    hold other samples with weight 0, and `TrainingBatch.damaged` names the damaged ones.
    """
    if batch_size < 1:
        raise UserError(f"batch size: expected at least 1, got {batch_size}")
    sets = open_training_sets(tokens, features)
    reader = _Reader(sets, None, 0, options)
    tasks = rank_batches(0, batch_size * ranks.world_size, *ranks, last=sets.num_samples)
    tasks = fetched_in_order(tasks, sets.tokens.shard_sizes, sets.caches)
    return ordered_map(reader, tasks, options.num_workers)


def read_samples(tokens: Path, features: Path | None, samples: Sequence[int]) -> TrainingBatch:
    """The samples of these numbers, as evaluation reads them."""
    numbers = np.asarray(samples, dtype=np.int64)
    reader = _Reader(open_training_sets(tokens, features), None, 0, DEFAULTS)
    return reader(BatchTask(numbers, int(numbers[-1]) + 1))
