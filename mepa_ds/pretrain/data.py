"""Opens the shard sets of a run, checks them against the recipe, and identifies their content."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from mepa_ds import distributed
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.lockstep import report_damaged
from mepa_ds.data.options import LoaderOptions
from mepa_ds.data.remote.schemes import allow
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import INDEX_NAME
from mepa_ds.data.training import TrainingBatch, TrainingSets, open_training_sets, training_batches
from mepa_ds.errors import UserError
from mepa_ds.pretrain.online import OnlineSets, open_images
from mepa_ds.tokenizer.tokenizer import identity_of
from mepa_ds.weights.directories import CONFIG_NAME


def open_checked(config: PretrainConfig) -> TrainingSets | OnlineSets:
    """Opens the shard sets. When one rank cannot, all ranks raise its UserError. Collective."""
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
    """Opens the shard sets in one process.

    Raises UserError for sets that are missing, or that do not fit the recipe or each other.
    """
    sets: TrainingSets | OnlineSets
    allow(config.data.remote_schemes)
    unique = config.data.unique_images
    if config.data.tokens is None:
        sets = OnlineSets.open(config)
        check_subset(unique, sets.images, sets.window)
    else:
        sets = open_training_sets(config.data.tokens, _features_of(config))
        _check_fit(config.model, sets, "data.tokens")
        _check_maker(config.tokenizer, config.model.scales, sets, "data.tokens")
        check_subset(unique, sets.tokens, sets.window)
    sets = replace(sets, unique_images=unique)
    if config.data.heldout_tokens is not None:
        training = sets.images if isinstance(sets, OnlineSets) else sets.tokens
        heldout = _open_heldout(config.data.heldout_tokens, config.model, training)
        _check_maker(config.tokenizer, config.model.scales, heldout, "data.heldout_tokens")
    return sets


def _features_of(config: PretrainConfig) -> Path | None:
    """The feature set, which semantic guidance alone reads."""
    return config.data.features if config.objective.alignment is not None else None


def check_made_sets(config: PretrainConfig) -> None:
    """Checks, for a plan, the sets that exist as `open_sets` does. Sets that are still to be made are left out.

    Raises UserError in the same cases as `open_sets`.
    """
    allow(config.data.remote_schemes)
    data, training = config.data, None
    tokenizer_is_made = _is_tokenizer_made(config.tokenizer)
    if data.images is not None:
        training = open_images(data.images, config.model.num_classes) if _is_made(data.images) else None
        if training is not None:
            check_subset(data.unique_images, training, training.window)
    elif data.tokens is not None and _is_made(data.tokens):
        features = _features_of(config)
        sets = open_training_sets(data.tokens, features if _is_made(features) else None)
        _check_fit(config.model, sets, "data.tokens")
        training = sets.tokens
        check_subset(data.unique_images, training, sets.window)
        if tokenizer_is_made:
            _check_maker(config.tokenizer, config.model.scales, sets, "data.tokens")
    if data.heldout_tokens is not None and _is_made(data.heldout_tokens):
        heldout = _open_heldout(data.heldout_tokens, config.model, training)
        if tokenizer_is_made:
            _check_maker(config.tokenizer, config.model.scales, heldout, "data.heldout_tokens")


def check_subset(unique_images: int | None, shards: ShardSet, window: int | None) -> None:
    """Raises UserError unless the set has that many samples, and is not shuffled in windows."""
    if unique_images is None:
        return
    if unique_images > len(shards):
        raise UserError(
            f"data.unique_images: {unique_images}, but {shards.what} {shards.directory} has {len(shards)} samples; "
            "give at most that many, or null for all"
        )
    if window is not None:
        raise UserError(
            f"data.unique_images: {unique_images}: a set that is fetched (remote.json; {shards.directory} or its "
            "features) is read whole, window by window; copy its shards to a local directory and give that, or set "
            "data.unique_images=null"
        )


def _is_tokenizer_made(path: Path) -> bool:
    return path.is_file() or (path / CONFIG_NAME).exists()  # config.json is written last


def _is_made(path: Path | None) -> bool:
    return path is not None and (path / INDEX_NAME).exists()


def _open_heldout(tokens: Path, model: ModelConfig, training: ShardSet | None) -> TrainingSets:
    """Opens the held-out set and makes all checks that do not need the tokenizer."""
    heldout = open_training_sets(tokens, None, "data.heldout_tokens")
    if training is not None:
        _check_same_classes(training, heldout.tokens)
    _check_fit(model, heldout, "data.heldout_tokens")
    return heldout


def _check_same_classes(first: ShardSet, second: ShardSet) -> None:
    """Raises UserError when a label means different classes in the two sets, if both sets name their classes.

    Numbers do not count as names, because readers number the classes of sets that have no names.
    """
    named = [shards.index.classes for shards in (first, second)]
    if all(map(_are_names, named)) and named[0] != named[1]:
        label = next((n for n, (a, b) in enumerate(zip(*named, strict=False)) if a != b), min(map(len, named)))
        meaning = [names[label] if label < len(names) else "nothing" for names in named]
        raise UserError(
            f"{first.what} {first.directory} and {second.what} {second.directory} have different classes: label "
            f"{label} is {meaning[0]!r} in the first and {meaning[1]!r} in the second; make one of them again with the "
            "classes of the other: mepa data build has --classes for that"
        )


def _are_names(classes: tuple[str, ...]) -> bool:
    return bool(classes) and classes != tuple(map(str, range(len(classes))))


def _check_fit(model: ModelConfig, sets: TrainingSets, key: str) -> None:
    facts = (("scales", sets.scales, model.scales), ("codebook_size", sets.codebook_size, model.codebook_size))
    for name, theirs, ours in facts:
        if theirs != ours:
            raise UserError(f"model.{name}: {ours}, but {key} {sets.tokens.directory} has {theirs}; set model.{name}")
    # Labels that are bare numbers mean the same in every set, so a held-out set may lack the last classes.
    may_lack = key != "data.tokens" and not _are_names(sets.tokens.index.classes)
    if sets.num_classes > model.num_classes or (0 < sets.num_classes < model.num_classes and not may_lack):
        raise UserError(
            f"model.num_classes: {model.num_classes}, but {key} {sets.tokens.directory} has {sets.num_classes} "
            "classes; set model.num_classes, or make the set again with all classes (mepa data build has "
            "--classes for that)"
        )


def _check_maker(tokenizer: Path, scales: tuple[int, ...], sets: TrainingSets, key: str) -> None:
    identity = identity_of(tokenizer, scales)
    if sets.tokenizer.identity != identity:
        raise UserError(
            f"{key}: {sets.tokens.directory} was made by tokenizer {sets.tokenizer.name!r} "
            f"({sets.tokenizer.identity}), but tokenizer: {tokenizer} is {identity}; precompute the tokens "
            "again with that tokenizer (mepa data precompute tokens), or point tokenizer: to their maker"
        )


def data_identity(config: PretrainConfig, sets: TrainingSets | OnlineSets) -> dict[str, str]:
    """Returns what the order and content of the samples depend on, by key of the recipe. A resumed run needs the same.

    The location of the sets does not matter, with one exception: fetched sets are shuffled within windows.
    """
    identity = {"seed": str(config.seed)}
    if sets.unique_images is not None:
        identity["data.unique_images"] = str(sets.unique_images)
    if sets.window is not None:
        identity["data.window"] = f"{sets.window} shards (remote.json)"
    if isinstance(sets, OnlineSets):
        return {**identity, "data.images": _set_identity(sets.images), **sets.networks}
    identity["data.tokens"] = _set_identity(sets.tokens)
    if config.objective.alignment is not None and sets.features is not None:
        identity["data.features"] = _set_identity(sets.features)
    return identity


def heldout_identity(path: Path | None) -> str:
    """Returns the identity of the held-out set; empty if `path` is None."""
    return "" if path is None else _set_identity(ShardSet(path, "data.heldout_tokens"))


def _set_identity(shards: ShardSet) -> str:
    """Returns an identity that is readable in a message and differs for different content."""
    index = shards.index
    content = [index.keys_sha256, index.made_by.model_dump(mode="json"), [shard.sha256 for shard in index.shards]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return f"{index.num_samples} samples by {index.made_by.name}, {digest}"


Stream = Callable[[int], Iterator[TrainingBatch]]
"""Maps a position of the sample stream to this rank's shares of all micro-batches from there on."""


def stream_of(config: PretrainConfig, sets: TrainingSets | OnlineSets) -> Stream:
    """Returns the recipe's stream. Which images share a micro-batch does not depend on the number of ranks."""
    data, seed = config.data, config.seed
    micro_batch = config.train.global_batch // config.train.accumulation
    options = LoaderOptions(
        num_workers=data.num_workers,
        pin_memory=distributed.uses_gpu(),
        on_damaged=data.on_damaged,
        num_classes=config.model.num_classes,
        unique_images=data.unique_images,
    )
    if isinstance(sets, OnlineSets):
        return lambda position: sets.batches(options, micro_batch, seed, position)
    assert data.tokens is not None
    tokens, features = data.tokens, _features_of(config)

    def stored(position: int) -> Iterator[TrainingBatch]:
        return training_batches(
            tokens,
            features,
            global_batch=micro_batch,
            seed=seed,
            position=position,
            ranks=distributed.ranks(),
            options=options,
        )

    return stored


class Loader:
    """The batches of a stream. Counts the position, the time spent waiting, and the damaged samples."""

    def __init__(self, stream: Stream, position: int):
        self._stream = stream
        self.seconds = 0.0
        """How long this rank has waited for its own data so far. Waits for other ranks do not count."""
        self._damaged: list[str] = []
        self.load_state_dict({"position": position})

    def state_dict(self) -> dict[str, int]:
        """Returns the loader's whole state: the first position of the sample stream that no batch has used yet."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from the position in `state`, on any number of ranks and workers."""
        self._position = state["position"]
        self._batches = self._stream(self._position)

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        started = time.perf_counter()
        try:
            batch = next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started
        report_damaged(batch.damaged)
        self._damaged += batch.damaged
        self._position = batch.next_position
        return batch

    def take_damaged(self) -> list[str]:
        """Returns what was wrong with the samples that were replaced since the last call, on all ranks. Collective."""
        mine, self._damaged = self._damaged, []
        return [line for lines in distributed.of_all(mine) for line in lines]
