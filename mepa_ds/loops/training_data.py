"""The shard sets of a run: opened, checked against the recipe, and told apart from others."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from mepa_ds import distributed, log
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.images import ImageBatch
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.training import TrainingBatch, TrainingSets, open_training_sets, training_batches
from mepa_ds.errors import UserError
from mepa_ds.loops.online import OnlineSets
from mepa_ds.tokenizer.tokenizer import identity_of


def open_checked(config: PretrainConfig) -> TrainingSets | OnlineSets:
    """Opens the shard sets; every rank leaves together when one of them cannot. Collective."""
    error: UserError | None = None
    sets: TrainingSets | OnlineSets | None = None
    try:
        sets = open_sets(config)
    except UserError as raised:
        error = raised
    distributed.agree(error)
    assert sets is not None
    return sets


def open_sets(config: PretrainConfig) -> TrainingSets | OnlineSets:
    """One process's view. Raises UserError for sets that are missing, or do not fit the recipe or each other."""
    sets: TrainingSets | OnlineSets
    if config.data.tokens is None:
        sets = OnlineSets.open(config)
    else:
        sets = open_training_sets(config.data.tokens, config.data.features)
        check_sets(config, sets)
    if config.data.heldout_tokens is not None:
        key = "data.heldout_tokens"
        heldout = open_training_sets(config.data.heldout_tokens, None, key)
        check_sets(config, heldout, key)
        images = sets.images if isinstance(sets, OnlineSets) else sets.tokens
        _check_same_classes(images, heldout.tokens)
    return sets


def _check_same_classes(first: ShardSet, second: ShardSet) -> None:
    """Raises UserError when a label means another class in the two sets, as far as they name their classes.

    Numbers are no names: readers give them where there are none.
    """
    named = [shards.index.classes for shards in (first, second)]
    are_names = [names and names != tuple(map(str, range(len(names)))) for names in named]
    if all(are_names) and named[0] != named[1]:
        label = next((n for n, (a, b) in enumerate(zip(*named, strict=False)) if a != b), min(map(len, named)))
        meaning = [names[label] if label < len(names) else "nothing" for names in named]
        raise UserError(
            f"{first.what} {first.directory} and {second.what} {second.directory} have other classes: label {label} is "
            f"{meaning[0]!r} there and {meaning[1]!r} here; make one of them again with the classes of the other"
        )


def check_sets(config: PretrainConfig, sets: TrainingSets, key: str = "data.tokens") -> None:
    """Raises UserError unless the tokens are the run's tokenizer's and fit the model."""
    model = config.model
    facts = (("scales", sets.scales, model.scales), ("codebook_size", sets.codebook_size, model.codebook_size))
    for name, theirs, ours in facts:
        if theirs != ours:
            raise UserError(f"model.{name}: {ours}, but {key} {sets.tokens.directory} has {theirs}; set model.{name}")
    identity = identity_of(config.tokenizer, model.scales)
    if sets.tokenizer.identity != identity:
        raise UserError(
            f"{key}: {sets.tokens.directory} was made by tokenizer {sets.tokenizer.name!r} "
            f"({sets.tokenizer.identity}), but tokenizer: {config.tokenizer} is {identity}; precompute the tokens "
            "again with that tokenizer (data_tools/precompute.py tokens), or point tokenizer: to their maker"
        )
    if sets.num_classes and sets.num_classes != model.num_classes:
        raise UserError(
            f"model.num_classes: {model.num_classes}, but {key} {sets.tokens.directory} has {sets.num_classes} classes"
        )


def data_identity(config: PretrainConfig, sets: TrainingSets | OnlineSets) -> dict[str, str]:
    """What the order and content of the samples depend on, by key of the recipe: a resumed run must have the same.

    Where the sets lie does not matter, but for one thing: those that are fetched are shuffled within windows.
    """
    identity = {"seed": str(config.seed)}
    if sets.window is not None:
        identity["data.window"] = f"{sets.window} shards (remote.json)"
    if isinstance(sets, OnlineSets):
        return {**identity, "data.images": _set_identity(sets.images), **sets.networks}
    identity["data.tokens"] = _set_identity(sets.tokens)
    if config.objective.alignment is not None and sets.features is not None:
        identity["data.features"] = _set_identity(sets.features)
    return identity


def heldout_identity(config: PretrainConfig) -> str:
    """Of the set that held-out scores are of; empty without one."""
    path = config.data.heldout_tokens
    return "" if path is None else _set_identity(ShardSet(path, "data.heldout_tokens"))


def _set_identity(shards: ShardSet) -> str:
    """Readable in a message, and different for different content."""
    index = shards.index
    content = [index.keys_sha256, index.made_by.model_dump(mode="json"), [shard.sha256 for shard in index.shards]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return f"{index.num_samples} samples by {index.made_by.name}, {digest}"


class Loader:
    """This rank's share of one micro-batch after the other; which images share one does not depend on the ranks."""

    def __init__(self, config: PretrainConfig, sets: TrainingSets | OnlineSets, position: int):
        self._config, self._sets = config, sets
        self.seconds = 0.0
        """This rank's own waits for its data so far, not those for other ranks'."""
        self._damaged: list[str] = []
        self.load_state_dict({"position": position})

    def state_dict(self) -> dict[str, int]:
        """The first position of the sample stream that no batch has had yet: all that a loader's state is."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there, on any number of ranks and workers."""
        self._position = state["position"]
        self._batches = self._from_position()

    def _from_position(self) -> Iterator[TrainingBatch]:
        config = self._config
        if isinstance(self._sets, OnlineSets):
            return self._sets.batches(config, self._position)
        assert config.data.tokens is not None
        return training_batches(
            config.data.tokens,
            config.data.features if config.objective.alignment is not None else None,
            global_batch=config.train.global_batch // config.train.accumulation,
            seed=config.seed,
            position=self._position,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=config.data.num_workers,
            pin_memory=torch.cuda.is_available(),
            on_damaged=config.data.on_damaged,
            num_classes=config.model.num_classes,
        )

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        started = time.perf_counter()
        try:
            batch = next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started
        report_damaged(batch)
        self._damaged += batch.damaged
        self._position = batch.next_position
        return batch

    def take_damaged(self) -> list[str]:
        """What was wrong with samples that were replaced since the last call, on all ranks. Collective."""
        mine, self._damaged = self._damaged, []
        if distributed.world_size() == 1:
            return mine
        everyone: list[list[str]] = [[] for _ in range(distributed.world_size())]
        dist.all_gather_object(everyone, mine)
        return [line for lines in everyone for line in lines]


def report_damaged(batch: TrainingBatch | ImageBatch) -> None:
    """Names replaced samples on the rank that read them: a job's log has all ranks' lines."""
    for line in batch.damaged:
        log.note(f"rank {distributed.rank()}: damaged sample replaced: {line}")
