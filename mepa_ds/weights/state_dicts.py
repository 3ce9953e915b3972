"""Finds the state dict that a reader looks for among a training program's nested mappings."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mepa_ds.errors import UserError

# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put before any part of a name.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_COUNTERS = ("n_averaged",)  # beside the weights of torch's AveragedModel
_NOTES = ("args", "config", "cfg", "hparams", "hyper_parameters")
_AVERAGE = re.compile(r"(^|_)ema(_|$)", re.IGNORECASE)
_MAX_DEPTH = 6
MAX_NAMED = 5
_MAX_MATCHES = 16
"""Of one mapping: two that differ are refused."""
_MAX_SHOWN = 100

T = TypeVar("T")
Key = str | int
Nests = dict[tuple[Key, ...], dict[str, T]]


@dataclass(frozen=True)
class Wanted:
    """What a reader looks for: a network, and a few names that any state dict of it has."""

    what: str
    names: tuple[str, ...]
    other_names: tuple[tuple[str, ...], ...] = ()
    """The same for each other layout in which it is stored."""


@dataclass(frozen=True)
class Found(Generic[T]):
    """A state dict with the names that its network uses, and its place in the file."""

    place: tuple[Key, ...]
    """Keys of the mappings around it, from the outermost."""
    prefix: str
    """The beginning that its names have in the file, without the wrappers' parts."""
    entries: dict[str, T]
    names_in_file: tuple[str, ...]

    @property
    def label(self) -> str:
        parts = [*map(str, self.place), *([self.prefix.rstrip(".")] if self.prefix else [])]
        return repr(".".join(parts)) if parts else "the outermost names"


def nests_of(tree: Any) -> Nests[Tensor]:
    """Every mapping in what `torch.load` gave that has named tensors, by its place. Looks six levels deep."""
    nests: Nests[Tensor] = {}
    seen: set[int] = set()  # a pickle may hold itself

    def walk(node: Any, place: tuple[Key, ...]) -> None:
        if id(node) in seen or len(place) > _MAX_DEPTH:
            return
        seen.add(id(node))
        children = _children(node)
        tensors = {key: child for key, child in children if isinstance(key, str) and isinstance(child, Tensor)}
        if tensors and not isinstance(node, Sequence):
            nests[place] = tensors
        for key, child in children:
            if isinstance(child, Mapping | list | tuple):
                walk(child, (*place, key))

    walk(tree, ())
    return nests


def notes_in(tree: Any, place: tuple[Key, ...]) -> list[Mapping[str, Any]]:
    """The settings (`args`, `config`, ...) beside the mapping at `place` and beside those around it, nearest first."""
    notes: list[Mapping[str, Any]] = []
    for key in (*place, None):
        if isinstance(tree, Mapping):
            notes = [tree[name] for name in _NOTES if isinstance(tree.get(name), Mapping)] + notes
        tree = None if key is None else dict(_children(tree)).get(key)
    return notes


def averages_not_read(tree: Any, found: Found[Any], wanted: Wanted | None) -> list[str]:
    """Keys beside or around the found state dict that, by their names, hold averaged weights in an unreadable form.

    Such forms are lists without names, and names without dots. Averages that have the wanted names are not among them:
    `find` refuses a file with both, unless they are equal.
    """
    keys: list[str] = []
    unread: dict[int, bool] = {}  # many names may have one value
    for key in (*found.place, None):
        for name, child in _children(tree):
            if name != key and _AVERAGE.search(str(name)):
                if id(child) not in unread:
                    unread[id(child)] = _is_unread(child, wanted)
                if unread[id(child)]:
                    keys.append(str(name))
        if key is not None:
            tree = dict(_children(tree))[key]
    beside = tree.keys() - set(found.names_in_file) if found.prefix else ()
    firsts = dict.fromkeys(str(name).split(".", 1)[0] for name in beside if isinstance(tree[name], Tensor))
    return keys + sorted(first for first in firsts if _AVERAGE.search(first))


def find(nests: Nests[T], wanted: Wanted | None, where: str, file: Path | None = None) -> Found[T]:
    """Finds the state dict that has the wanted names, and takes the wrappers' parts out of its names.

    If none has them, or no names are wanted, the outermost one is taken, provided that there is only one. What it lacks
    is then for the reader to say.

    Args:
        file: the file that the nests are from, for the command in a refusal; None: they are in memory.

    Raises:
        UserError: none of several is the wanted one, or several are and their values differ.
    """
    cleaned = {place: _without_wrappers(entries) for place, entries in nests.items()}
    matches = [found for place in nests for found in _matches(cleaned[place], nests[place], place, wanted)]
    if not matches:
        depth = min(map(len, nests))
        outer = [place for place in nests if len(place) == depth]
        matches = [_found(cleaned[place], nests[place], place, "") for place in outer]
        if wanted is not None and len(matches) > 1:
            held = listed([f"{found.label} ({', '.join(list(found.entries)[:3])}, ...)" for found in matches])
            raise UserError(f"{where}: no state dict of {wanted.what} among those in it: {held}")
    first, *others = matches
    if others := [other for other in others if not _equal(first.entries, other.entries)]:
        raise UserError(_ambiguous([first, *others], wanted, where, file))
    return first


def _children(node: Any) -> list[tuple[Key, Any]]:
    if isinstance(node, Mapping):
        return [(key, child) for key, child in node.items() if isinstance(key, str | int)]
    return list(enumerate(node)) if isinstance(node, list | tuple) else []


def _is_unread(node: Any, wanted: Wanted | None) -> bool:
    """Whether a node holds tensors but no state dict with the wanted names."""
    nests = nests_of(node)
    cleaned = {place: _without_wrappers(entries) for place, entries in nests.items()}
    return _has_tensors(node, 3) and not any(any(_matches(cleaned[at], nests[at], at, wanted)) for at in nests)


def _has_tensors(node: Any, depth: int) -> bool:
    level = {id(node): node}  # each node once: nested lists of one list have as many entries as there are atoms
    for _ in range(depth + 1):
        children = [child for inner in level.values() for _, child in _children(inner)]
        if any(isinstance(child, Tensor) for child in children):
            return True
        level = {id(child): child for child in children if isinstance(child, Mapping | list | tuple)}
    return False


def _without_wrappers(entries: Mapping[str, T]) -> dict[str, str]:
    """Name without the wrappers' parts -> name in the file. Two names that would become one stay as they are."""
    names = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in entries}
    if len(names) > 1:
        names = {name: clean for name, clean in names.items() if clean not in _COUNTERS}
    if len(set(names.values())) < len(names):
        return {name: name for name in names}
    return {clean: name for name, clean in names.items()}


def _matches(
    cleaned: Mapping[str, str], entries: Mapping[str, T], place: tuple[Key, ...], wanted: Wanted | None
) -> Iterator[Found[T]]:
    """The parts of this mapping that have more than half of the names of a wanted layout, each behind some prefix."""
    if wanted is None:
        return
    full: list[str] = []
    for names in (wanted.names, *wanted.other_names):
        prefixes = dict.fromkeys(
            name[: -len(known)] for name in cleaned for known in names if f".{name}".endswith(f".{known}")
        )
        full += [
            prefix
            for prefix in prefixes
            if prefix not in full and sum(prefix + name in cleaned for name in names) > len(names) / 2
        ]
    for prefix in full[:_MAX_MATCHES]:
        yield _found(cleaned, entries, place, prefix, [other for other in full if len(other) > len(prefix)])


def _found(
    cleaned: Mapping[str, str],
    entries: Mapping[str, T],
    place: tuple[Key, ...],
    prefix: str,
    others: Sequence[str] = (),
) -> Found[T]:
    """The entries that have the prefix, without those that have one of `others`, which are longer prefixes."""
    names = {
        name[len(prefix) :]: raw
        for name, raw in cleaned.items()
        if name.startswith(prefix) and not name.startswith(tuple(others))
    }
    return Found(place, prefix, {name: entries[raw] for name, raw in names.items()}, tuple(names.values()))


def _equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        isinstance(first[name], Tensor)
        and first[name].dtype == second[name].dtype
        and torch.equal(first[name], second[name])
        for name in first
    )


def _ambiguous(matches: Sequence[Found[Any]], wanted: Wanted | None, where: str, file: Path | None) -> str:
    labels = listed([found.label for found in matches])
    what = "state dict" if wanted is None else f"state dict of {wanted.what}"
    told = f"{where}: more than one {what} in it, with other values: {labels}. "
    if file is None:
        return told + "Give the one you mean alone"
    chosen = matches[-1] if matches[-1].place or matches[-1].prefix else matches[0]
    out = file.with_name(f"{file.stem}-{'-'.join(map(str, chosen.place)) or chosen.prefix.rstrip('.')}{file.suffix}")
    source, target = json.dumps(str(file)), json.dumps(str(out))
    if file.suffix == ".safetensors":
        imports, state, save = "from safetensors.torch import *", f"load_file({source})", "save_file"
    else:
        imports, state, save = "import torch", f'torch.load({source}, "cpu", weights_only=True)', "torch.save"
    state += "".join(f"[{json.dumps(key)}]" for key in chosen.place)
    if chosen.prefix:
        start = json.dumps(_shared_start(chosen.names_in_file))
        state = f"{{k: v for k, v in {state}.items() if k.startswith({start})}}"
    code = shlex.quote(f"{imports}; {save}({state}, {target})")
    return told + f"Save the one you mean alone and give that file; for {chosen.label}: python -c {code}"


def _shared_start(names: Sequence[str]) -> str:
    """The leading parts, with their dots, that all names have in common."""
    parts = names[0].split(".")[:-1]
    while parts and not all(name.startswith(".".join([*parts, ""])) for name in names):
        parts.pop()
    return ".".join([*parts, ""]) if parts else ""


def listed(names: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return (
        ", ".join(name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}..." for name in names[:MAX_NAMED]) + more
    )
