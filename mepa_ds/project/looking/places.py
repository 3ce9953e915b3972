"""Looks at the images that a user names: what kind of place it is, which classes, how many, how large, grey or not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mepa_ds import log
from mepa_ds.data.shards.index import INDEX_NAME, ShardIndex
from mepa_ds.data.shards.left_out import few
from mepa_ds.data.shards.samples import is_hidden
from mepa_ds.data_tools.readers import ImageFolder, WebDataset
from mepa_ds.data_tools.readers.source import Reader, Source
from mepa_ds.errors import UserError
from mepa_ds.images.decoding import is_image_name
from mepa_ds.project.looking.digits import DIGITS, DIGITS_FACTS
from mepa_ds.project.looking.facts import ImageFacts, Kind
from mepa_ds.project.looking.opened import Opened, open_some, range_of
from mepa_ds.safety.text import printable

_TRAIN = ("train", "training")
_HELDOUT = ("heldout", "val", "valid", "validation", "test")
_FEW_IMAGES = 50


@dataclass
class _Place:
    """Where images are, as readers and as words of `mepa data build`."""

    kind: Kind
    train: Reader
    train_words: tuple[str, ...]
    heldout: Reader | None = None
    heldout_words: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def look(source: str) -> ImageFacts:
    """Lists all images and opens some hundred of them, spread evenly.

    Raises:
        UserError: there is no such folder, it has no images, or none of those that were opened can be read.
    """
    if source == DIGITS:
        if Path(source).is_dir():
            log.note(f"note: {DIGITS} means scikit-learn's digits; for the folder of that name write ./{DIGITS}")
        return DIGITS_FACTS
    path = Path(source).expanduser().absolute()
    return facts_of(str(path), _place(path))


def facts_of(source: str, place: _Place) -> ImageFacts:
    """The facts of a place; a test gives readers of its own."""
    listing = place.train.open(None)
    if len(listing) == 0:
        raise UserError(f"{printable(source)}: no images found")
    counts = Counter(listing.label(number) for number in range(len(listing)))
    if place.heldout is not None and len(place.heldout.open(None)) == 0:
        raise UserError(f"{printable(source)}: the folder of held-out images has none; fill or remove it")
    opened = open_some(listing)
    if not opened.sides:
        raise UserError(
            f"{printable(source)}: none of {len(opened.unreadable)} images can be read: {opened.unreadable[0]}"
        )
    kind, words = place.kind, (place.train_words, place.heldout_words)
    if (
        kind == "shards"
        and place.heldout is not None
        and opened.is_one_square
        and max(opened.sides) in (32, 64, 128, 256)
    ):
        kind, words = "ready_shards", (place.train_words[2:], place.heldout_words[2:])
    sizes = Counter(range_of(side) for side in sorted(opened.sides))
    return ImageFacts(
        source=source,
        kind=kind,
        train_words=words[0],
        heldout_words=words[1],
        classes=tuple(listing.classes),
        counts=tuple(counts[label] for label in sorted(counts)),
        sides=(min(opened.sides), int(np.median(opened.sides)), max(opened.sides)),
        sizes=dict(sizes),
        num_opened=len(opened.sides) + len(opened.unreadable),
        colour=opened.colour,
        unreadable=tuple(opened.unreadable),
        notes=(*place.notes, *_notes(listing, counts, opened)),
    )


def _place(path: Path) -> _Place:
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise UserError(
            f"{printable(str(path))}: {what}; give a folder of class folders, a folder of images, a shard set, or the "
            f"word {DIGITS} (archives, parquet and others become shard sets by mepa data build)"
        )
    if (path / INDEX_NAME).exists():
        return _shards(path, None)
    below = {entry.name.lower(): path / entry.name for entry in os.scandir(path) if entry.is_dir()}
    train = next((below[name] for name in _TRAIN if name in below), None)
    if train is None:
        return _folder(path)
    if _is_class(train, below):
        place = _folder(path)
        place.notes.append(f"{train.name} is taken for a class: it has no class folders, and stands beside classes")
        return place
    others = [below[name] for name in _HELDOUT if name in below]
    if (train / INDEX_NAME).exists():
        return _shards(train, next((other for other in others if (other / INDEX_NAME).exists()), None))
    place, is_flat = _folder(train), not _has_class_folders(train)
    for other in others:
        if _has_class_folders(other) == (not is_flat) and any(_images_below(other)):
            place.heldout = ImageFolder(other, flat=is_flat, skip_empty=True)
            place.heldout_words = ("imagefolder", "--root", str(other), "--skip-empty")
            if is_flat:
                place.heldout_words += ("--flat",)
            else:
                _check_known(train, other)
            break
        place.notes.append(f"{printable(str(other))} is not used: its images are in no class folders as those in train")
    return place


def _is_class(train: Path, below: Mapping[str, Path]) -> bool:
    """Whether `train` is a thing on rails: a folder of images among others that are no split's."""
    if (train / INDEX_NAME).exists() or _has_class_folders(train):
        return False
    others = (folder for name, folder in below.items() if name not in (*_TRAIN, *_HELDOUT) and not is_hidden(name))
    return any(any(_images_below(folder)) for folder in others)


def _check_known(train: Path, heldout: Path) -> None:
    """Held-out classes must be those of training, in the same order: labels are places in that order."""
    mine, others = (_class_folders(folder) for folder in (train, heldout))
    if mine != others:
        strange = sorted(set(mine) ^ set(others))
        raise UserError(
            f"{printable(str(heldout))}: its class folders are not those of {printable(str(train))} ({few(strange)} in "
            "one of them alone); make them the same, or remove it, and training images are held out instead"
        )


def _class_folders(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not is_hidden(entry.name) and any(_images_below(Path(entry.path)))
    )


def _shards(train: Path, heldout: Path | None) -> _Place:
    index = ShardIndex.read(train)
    if index.kind != "images":
        raise UserError(f"{printable(str(train))}: holds {index.kind}; give the images they were made of")
    words = [("webdataset", "--shards", str(path)) for path in (train, heldout) if path is not None]
    readers = [WebDataset(path) for _, _, path in words]
    if heldout is None:
        return _Place("shards", readers[0], words[0])
    return _Place("shards", readers[0], words[0], readers[1], words[1])


def _folder(path: Path) -> _Place:
    words = ("imagefolder", "--root", str(path))
    if _has_class_folders(path):
        place = _Place("folder", ImageFolder(path, skip_empty=True), (*words, "--skip-empty"))
        loose = sum(is_image_name(entry.name) for entry in os.scandir(path) if entry.is_file())
        if loose:
            place.notes.append(f"{loose} images beside the class folders are left out: they have no class")
        return place
    if any(_images_below(path)):
        place = _Place("folder", ImageFolder(path, flat=True), (*words, "--flat"))
        place.notes.append("there are no class folders: all images are one class, named as the folder")
        return place
    raise UserError(
        f"{printable(str(path))}: no images in it or in its folders; expected files named .jpg or the like, in one "
        "folder for each class"
    )


def _has_class_folders(path: Path) -> bool:
    return any(any(_images_below(Path(entry.path))) for entry in os.scandir(path) if _may_be_class(entry))


def _may_be_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not is_hidden(entry.name)


def _images_below(path: Path) -> Iterator[str]:
    """Stops at the first that is asked for: folders of a million images are not listed to find one. Links are followed,
    but not round and round."""
    seen = set[str]()
    for folder, folders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (name for name in files if is_image_name(name))


def _notes(listing: Source, counts: Counter[int], opened: Opened) -> list[str]:
    notes = []
    names = listing.classes
    by_lower = Counter(name.casefold() for name in names)
    if same := [name for name in names if by_lower[name.casefold()] > 1]:
        notes.append(f"classes that differ only in case are two classes each: {few(same)}; merge them if they are one")
    if counts and (single := sum(count == 1 for count in counts.values())):
        notes.append(f"{single} of {len(counts)} classes have one image: none of these can be held out")
    if len(listing) < _FEW_IMAGES:
        notes.append(f"{len(listing)} images are few: the model will learn them by heart")
    if opened.colour == "mixed":
        notes.append(f"grey and colour images are mixed, {opened.num_grey} of {opened.num_grey + opened.num_colour} "
                     "are grey: all become RGB")  # fmt: skip
    if opened.unreadable:
        shown = few(opened.unreadable, 3)
        notes.append(
            f"{len(opened.unreadable)} of the images that were opened cannot be read, and are left out: {shown}"
        )
    return notes
