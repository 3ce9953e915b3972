"""Training without precomputed sets: the tokenizer and the teacher run on the image batches at every step.

For images stored as squares of the tokenizer's side, the batches equal the batches of token and feature sets that were
precomputed from these images (with features as the codec fp16 stores them), in the same order. Larger images are
cropped at random, anew in every epoch, which precomputed sets cannot do. The cost is a forward pass of both networks
per step.

Legend: B batch of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mepa_ds import distributed
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.codecs import FeatureDecoder, codec_named
from mepa_ds.data.images import ImageBatch, image_batches
from mepa_ds.data.options import LoaderOptions
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.training import TrainingBatch, check_labels
from mepa_ds.errors import UserError
from mepa_ds.teachers.base import Teacher
from mepa_ds.teachers.registry import build_teacher
from mepa_ds.tokenizer.tokenizer import Tokenizer

_CODEC = codec_named("fp16")


def open_images(path: Path, model_classes: int) -> ShardSet:
    """Opens images. Raises UserError when the set is missing, of another kind, or has other classes than the model."""
    images = ShardSet(path, "data.images")
    if images.index.kind != "images":
        raise UserError(f"data.images: {images.directory}: holds {images.index.kind}; set data.tokens to it")
    num_classes = len(images.index.classes)
    if num_classes not in (0, model_classes):
        raise UserError(
            f"model.num_classes: {model_classes}, but data.images {images.directory} has {num_classes} classes"
        )
    return images


@dataclass(frozen=True)
class OnlineSets:
    """Replaces `TrainingSets` when a recipe gives data.images: holds the images and the frozen networks."""

    images: ShardSet
    tokenizer: Tokenizer
    teacher: Teacher | None
    """None without semantic guidance."""
    device: torch.device
    unique_images: int | None = None
    """How many images of the set a run trains on; None: all."""

    @classmethod
    def open(cls, config: PretrainConfig) -> OnlineSets:
        """Opens all parts. Raises UserError when a set or checkpoint is missing or does not fit the model."""
        assert config.data.images is not None
        model = config.model
        images = open_images(config.data.images, model.num_classes)
        device = distributed.device_of(distributed.read_launch())
        tokenizer = Tokenizer.open(config.tokenizer, model.scales)
        if tokenizer.config.codebook_size != model.codebook_size:
            raise UserError(
                f"model.codebook_size: {model.codebook_size}, but tokenizer: {config.tokenizer} has "
                f"{tokenizer.config.codebook_size}; set model.codebook_size"
            )
        teacher = None
        if config.objective.alignment is not None and config.data.teacher is not None:
            teacher = build_teacher(config.data.teacher.name, config.data.teacher.weights).to(device)
        return cls(images, tokenizer.to(device), teacher, device)

    @property
    def num_samples(self) -> int:
        """The images of an epoch."""
        return len(self.images) if self.unique_images is None else self.unique_images

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label; empty when the set does not say."""
        return self.images.index.classes

    @property
    def window(self) -> int | None:
        return self.images.window

    @property
    def feature_width(self) -> int | None:
        return None if self.teacher is None else self.teacher.width

    @property
    def networks(self) -> dict[str, str]:
        """The identities of the networks' weights, by key of the recipe."""
        teacher = {} if self.teacher is None else {"data.teacher": f"{self.teacher.name}, {self.teacher.identity}"}
        return {"tokenizer": self.tokenizer.identity, **teacher}

    def batches(self, options: LoaderOptions, global_batch: int, seed: int, position: int) -> Iterator[TrainingBatch]:
        """Yields this rank's share of each micro-batch from `position` of the stream on, like `training_batches`.

        `global_batch` is the number of images in a micro-batch over all ranks.

        Raises:
            UserError: for a damaged image under "stop", or for an image whose label is not a class of the model.
        """
        ranks = distributed.ranks()
        share = global_batch // ranks.world_size
        batches = image_batches(
            self.images.directory,
            batch_size=share,
            image_side=self.tokenizer.config.image_side,
            seed=seed,
            position=position,
            ranks=ranks,
            options=options,
        )
        for batch in batches:
            first = batch.next_position - global_batch + ranks.rank * share
            yield self._encode(batch, torch.arange(first, first + share), options.num_classes)

    def _encode(self, batch: ImageBatch, positions_B: torch.Tensor, num_classes: int | None) -> TrainingBatch:
        where = f"data.images: {self.images.directory}"
        check_labels(batch.labels_B, num_classes, lambda row: f"{where}: sample {batch.keys[row]!r}")
        images_B3HW = batch.to(self.device).images_B3HW
        stored, decoder = {}, None
        if self.teacher is not None:
            stored, decoder = _CODEC.encode(self.teacher.patch_features(images_B3HW)), FeatureDecoder(_CODEC)
        return TrainingBatch(
            tokens_BL=self.tokenizer.encode(images_B3HW),
            labels_B=batch.labels_B,
            weight_B=torch.ones(len(batch.labels_B)),
            positions_B=positions_B,
            keys=batch.keys,
            next_position=batch.next_position,
            stored_features=stored,
            decoder=decoder,
            damaged=batch.damaged,
        )
