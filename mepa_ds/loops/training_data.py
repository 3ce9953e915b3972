"""The shard sets of a run: opened, checked against the recipe, and told apart from others."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator

import torch

from mepa_ds import distributed
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.training import TrainingBatch, TrainingSets, open_training_sets, training_batches
from mepa_ds.errors import UserError
from mepa_ds.tokenizer.tokenizer import identity_of


def open_checked(config: PretrainConfig) -> TrainingSets:
    """Opens the shard sets; every rank leaves together when one of them cannot. Collective."""
    error: UserError | None = None
    sets: TrainingSets | None = None
    try:
        sets = open_training_sets(config.data.tokens, config.data.features)
        check_sets(config, sets)
        if config.data.heldout_tokens is not None:
            check_sets(config, open_training_sets(config.data.heldout_tokens, None), "data.heldout_tokens")
    except UserError as raised:
        error = raised
    distributed.agree(error)
    assert sets is not None
    return sets


def check_sets(config: PretrainConfig, sets: TrainingSets, key: str = "data.tokens") -> None:
    """Raises UserError unless the tokens are the run's tokenizer's and fit the model."""
    identity = identity_of(config.tokenizer)
    if sets.tokenizer.identity != identity:
        raise UserError(
            f"{key}: {sets.tokens.directory} was made by tokenizer {sets.tokenizer.name!r} "
            f"({sets.tokenizer.identity}), but tokenizer: {config.tokenizer} is {identity}; precompute the tokens "
            "again with that tokenizer (data_tools/precompute.py tokens), or point tokenizer: to their maker"
        )
    model = config.model
    facts = (("scales", sets.scales, model.scales), ("codebook_size", sets.codebook_size, model.codebook_size))
    for name, theirs, ours in facts:
        if theirs != ours:
            raise UserError(f"model.{name}: {ours}, but {key} {sets.tokens.directory} has {theirs}; set model.{name}")
    if sets.num_classes and sets.num_classes != model.num_classes:
        raise UserError(
            f"model.num_classes: {model.num_classes}, but {key} {sets.tokens.directory} has {sets.num_classes} classes"
        )


def data_identity(config: PretrainConfig, sets: TrainingSets) -> dict[str, str]:
    """What the order and content of the samples depend on, by key of the recipe: a resumed run must have the same.

    Where the sets lie does not matter.
    """
    identity = {"seed": str(config.seed), "data.tokens": _set_identity(sets.tokens)}
    if config.objective.alignment is not None and sets.features is not None:
        identity["data.features"] = _set_identity(sets.features)
    return identity


def _set_identity(shards: ShardSet) -> str:
    """Readable in a message, and different for different content."""
    index = shards.index
    content = [index.keys_sha256, index.made_by.model_dump(mode="json"), [shard.sha256 for shard in index.shards]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return f"{index.num_samples} samples by {index.made_by.name}, {digest}"


class Loader:
    """This rank's share of one micro-batch after the other; which images share one does not depend on the ranks."""

    def __init__(self, config: PretrainConfig, position: int):
        self._batches = training_batches(
            config.data.tokens,
            config.data.features if config.objective.alignment is not None else None,
            global_batch=config.train.global_batch // config.train.accumulation,
            seed=config.seed,
            position=position,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=config.data.num_workers,
            pin_memory=torch.cuda.is_available(),
            on_damaged=config.data.on_damaged,
        )
        self.seconds = 0.0
        """Waited for data by this rank so far."""
        self.num_replaced = 0
        """Damaged samples of this rank that were replaced so far (data.on_damaged = "skip")."""

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        started = time.perf_counter()
        try:
            batch = next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started
        for line in batch.damaged:
            # On the rank that read it: only that one knows, and a log has all ranks' lines.
            print(f"rank {distributed.rank()}: damaged sample replaced: {line}", file=sys.stderr, flush=True)
        self.num_replaced += len(batch.damaged)
        return batch
