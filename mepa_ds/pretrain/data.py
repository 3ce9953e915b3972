"""The shard sets of a run: opened, checked against the recipe, and told apart from others."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from mepa_ds import distributed
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.lockstep import report_damaged
from mepa_ds.data.options import LoaderOptions
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import INDEX_NAME
from mepa_ds.data.training import TrainingBatch, TrainingSets, open_training_sets, training_batches
from mepa_ds.errors import UserError
from mepa_ds.pretrain.online import OnlineSets, open_images
from mepa_ds.tokenizer.tokenizer import identity_of
from mepa_ds.weights.directories import CONFIG_NAME


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
        _check_fit(config.model, sets, "data.tokens")
        _check_maker(config.tokenizer, config.model.scales, sets, "data.tokens")
    if config.data.heldout_tokens is not None:
        training = sets.images if isinstance(sets, OnlineSets) else sets.tokens
        heldout = _open_heldout(config.data.heldout_tokens, config.model, training)
        _check_maker(config.tokenizer, config.model.scales, heldout, "data.heldout_tokens")
    return sets


def check_made_sets(config: PretrainConfig) -> None:
    """For a plan: what `open_sets` would say of the sets that are there. What is still to be made is left out.

    Raises UserError as that does.
    """
    data, training = config.data, None
    tokenizer_is_made = _is_tokenizer_made(config.tokenizer)
    if data.images is not None:
        training = open_images(data.images, config.model.num_classes) if _is_made(data.images) else None
    elif data.tokens is not None and _is_made(data.tokens):
        sets = open_training_sets(data.tokens, data.features if _is_made(data.features) else None)
        _check_fit(config.model, sets, "data.tokens")
        training = sets.tokens
        if tokenizer_is_made:
            _check_maker(config.tokenizer, config.model.scales, sets, "data.tokens")
    if data.heldout_tokens is not None and _is_made(data.heldout_tokens):
        heldout = _open_heldout(data.heldout_tokens, config.model, training)
        if tokenizer_is_made:
            _check_maker(config.tokenizer, config.model.scales, heldout, "data.heldout_tokens")


def _is_tokenizer_made(path: Path) -> bool:
    return path.is_file() or (path / CONFIG_NAME).exists()  # the last file of a directory that is written


def _is_made(path: Path | None) -> bool:
    return path is not None and (path / INDEX_NAME).exists()


def _open_heldout(tokens: Path, model: ModelConfig, training: ShardSet | None) -> TrainingSets:
    """Checked, as far as can be said without the tokenizer."""
    heldout = open_training_sets(tokens, None, "data.heldout_tokens")
    if training is not None:
        _check_same_classes(training, heldout.tokens)
    _check_fit(model, heldout, "data.heldout_tokens")
    return heldout


def _check_same_classes(first: ShardSet, second: ShardSet) -> None:
    """Raises UserError when a label means another class in the two sets, as far as they name their classes.

    Numbers are no names: readers give them where there are none.
    """
    named = [shards.index.classes for shards in (first, second)]
    if all(map(_are_names, named)) and named[0] != named[1]:
        label = next((n for n, (a, b) in enumerate(zip(*named, strict=False)) if a != b), min(map(len, named)))
        meaning = [names[label] if label < len(names) else "nothing" for names in named]
        raise UserError(
            f"{first.what} {first.directory} and {second.what} {second.directory} have other classes: label {label} is "
            f"{meaning[0]!r} there and {meaning[1]!r} here; make one of them again with the classes of the other: "
            "data_tools/build_shards.py has --classes for that"
        )


def _are_names(classes: tuple[str, ...]) -> bool:
    return bool(classes) and classes != tuple(map(str, range(len(classes))))


def _check_fit(model: ModelConfig, sets: TrainingSets, key: str) -> None:
    facts = (("scales", sets.scales, model.scales), ("codebook_size", sets.codebook_size, model.codebook_size))
    for name, theirs, ours in facts:
        if theirs != ours:
            raise UserError(f"model.{name}: {ours}, but {key} {sets.tokens.directory} has {theirs}; set model.{name}")
    # Labels that are bare numbers mean the same in every set: a held-out one may lack the last classes.
    may_lack = key != "data.tokens" and not _are_names(sets.tokens.index.classes)
    if sets.num_classes > model.num_classes or (0 < sets.num_classes < model.num_classes and not may_lack):
        raise UserError(
            f"model.num_classes: {model.num_classes}, but {key} {sets.tokens.directory} has {sets.num_classes} "
            "classes; set model.num_classes, or make the set again with all classes (data_tools/build_shards.py has "
            "--classes for that)"
        )


def _check_maker(tokenizer: Path, scales: tuple[int, ...], sets: TrainingSets, key: str) -> None:
    identity = identity_of(tokenizer, scales)
    if sets.tokenizer.identity != identity:
        raise UserError(
            f"{key}: {sets.tokens.directory} was made by tokenizer {sets.tokenizer.name!r} "
            f"({sets.tokenizer.identity}), but tokenizer: {tokenizer} is {identity}; precompute the tokens "
            "again with that tokenizer (data_tools/precompute.py tokens), or point tokenizer: to their maker"
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


def heldout_identity(path: Path | None) -> str:
    """Of the set that held-out scores are of; empty without one."""
    return "" if path is None else _set_identity(ShardSet(path, "data.heldout_tokens"))


def _set_identity(shards: ShardSet) -> str:
    """Readable in a message, and different for different content."""
    index = shards.index
    content = [index.keys_sha256, index.made_by.model_dump(mode="json"), [shard.sha256 for shard in index.shards]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return f"{index.num_samples} samples by {index.made_by.name}, {digest}"


Stream = Callable[[int], Iterator[TrainingBatch]]
"""From a position of the sample stream on: this rank's share of one micro-batch after the other."""


def stream_of(config: PretrainConfig, sets: TrainingSets | OnlineSets) -> Stream:
    """The recipe's. Which images share a micro-batch does not depend on the number of ranks."""
    data, seed = config.data, config.seed
    micro_batch = config.train.global_batch // config.train.accumulation
    options = LoaderOptions(data.num_workers, torch.cuda.is_available(), data.on_damaged, config.model.num_classes)
    if isinstance(sets, OnlineSets):
        return lambda position: sets.batches(options, micro_batch, seed, position)
    assert data.tokens is not None
    tokens, features = data.tokens, data.features if config.objective.alignment is not None else None

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
    """Batches of a stream, with what a run must know of them: the place, the waits, the damage."""

    def __init__(self, stream: Stream, position: int):
        self._stream = stream
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
        """What was wrong with samples that were replaced since the last call, on all ranks. Collective."""
        mine, self._damaged = self._damaged, []
        if distributed.world_size() == 1:
            return mine
        everyone: list[list[str]] = [[] for _ in range(distributed.world_size())]
        dist.all_gather_object(everyone, mine)
        return [line for lines in everyone for line in lines]
