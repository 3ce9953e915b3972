"""A folder of images with one sub-folder a class: ImageNet's layout, torchvision's ImageFolder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mepa_ds import log
from mepa_ds.data.shards.left_out import few
from mepa_ds.data.shards.samples import is_hidden
from mepa_ds.data_tools.readers.class_names import read_class_names
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.files import read_file, why_unreadable
from mepa_ds.images.decoding import is_image_name
from mepa_ds.progress import Progress
from mepa_ds.safety.text import printable


@dataclass(frozen=True)
class ImageFolder:
    """ROOT/CLASS/**/*.jpg: classes are the sub-folders in alphabetical order."""

    root: Path
    """The folder of class folders, such as ILSVRC2012/train."""
    classes: Path | None = None
    """For a folder that lacks classes, such as a small validation set: the shard set of the training images, or a text
    file of all class names, one a line in the order of the labels."""
    flat: bool = False
    """ROOT holds images and no class folders: they are one class, named as the folder."""
    skip_empty: bool = False
    """Leave out class folders without images; without it they are an error."""

    def open(self, scratch: Path | None) -> ImageFolderSource:
        if not self.root.is_dir():
            raise UserError(f"--root: {self.root}: no such directory")
        _, folders, left_out = next(os.walk(self.root, onerror=_unreadable))
        _check_links(self.root, left_out)
        names = ["."] if self.flat else sorted(name for name in folders if not is_hidden(name))
        left_out += [f"{name}/" for name in folders if is_hidden(name)]
        if not names:
            raise UserError(f"--root: {self.root}: has no class folders; expected ROOT/CLASS/IMAGE.jpg")
        if self.flat:
            left_out.clear()  # they are listed below, as what is in a class folder is
        progress = Progress(names, "listing", unit="class", delay=2)
        images = {name: sorted(_images_below(self.root, name, left_out)) for name in progress}
        empty = [name for name in names if not images[name]]
        if empty and self.skip_empty:
            log.say(f"{self.root}: {len(empty)} class folders without images are left out ({few(empty)})")
            names, empty = [name for name in names if images[name]], []
        classes = self._classes(names)
        places = {name: place for place, name in enumerate(classes)}
        files, labels = list[str](), list[int]()
        for name in names:
            files += images[name]
            labels += [0 if self.flat else places[name]] * len(images[name])
        if left_out:
            log.say(
                f"{self.root}: {len(left_out)} files or folders are left out: not named .jpg or the like, hidden, or "
                f"links to what is listed already ({few(left_out)})"
            )
        if empty and self.classes is None:
            raise UserError(
                f"--root: {self.root}: {len(empty)} class folders have no images ({few(empty)}); "
                "fill or remove them, or name all classes with --classes"
            )
        if absent := sorted(set(classes) - {classes[label] for label in labels}):
            log.say(f"{self.root}: {len(absent)} of {len(classes)} classes have no images here ({few(absent)})")
        return ImageFolderSource(self.root, classes, files, labels)

    def _classes(self, folders: list[str]) -> tuple[str, ...]:
        if self.classes is None:
            return (self.root.resolve().name,) if self.flat else tuple(folders)
        classes = read_class_names(self.classes, "--classes")
        if self.flat and len(classes) > 1:
            raise UserError(f"--flat: {self.root}: one folder is one class, but --classes names {len(classes)}")
        if self.flat:
            return classes
        if unknown := [name for name in folders if name not in classes]:
            raise UserError(
                f"--root: {self.root}: {len(unknown)} folders are none of the {len(classes)} classes of "
                f"{self.classes} ({few(unknown)}); remove them, or give --classes that has them"
            )
        return classes


def _check_links(root: Path, files: list[str]) -> None:
    """Refuses links that lead nowhere: one may have been a class, and without it the other labels would shift."""
    for name in files:
        if (path := root / name).is_symlink() and not path.exists() and not is_hidden(name):
            raise UserError(
                f"--root: {printable(str(path))}: it is a link to {os.readlink(path)}, which is not there; "
                "mend or remove it"
            )


def _images_below(root: Path, name: str, left_out: list[str]) -> list[str]:
    """Paths of image files under a class folder, relative to the root. Links are followed, but not round and round."""
    found = list[str]()
    seen = set(root.resolve().parents)
    if name != ".":  # `flat`: the root itself is the class
        seen.add(root.resolve())
    for folder, folders, files in os.walk(root / name, onerror=_unreadable, followlinks=True):
        left_out += [f"{os.path.relpath(folder, root)}/{name}/" for name in folders if is_hidden(name)]
        # Sorted, so that of two links to one folder every file system takes the same one.
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        relative, real = os.path.relpath(folder, root), Path(folder).resolve()
        if real in seen:
            left_out.append(f"{relative}/")
            folders.clear()
            continue
        seen.add(real)
        for file in sorted(files):
            images = found if is_image_name(file) and not is_hidden(file) else left_out
            images.append(f"{relative}/{file}")
    return found


def _unreadable(error: OSError) -> None:
    raise UserError(
        f"--root: {error.filename}: cannot be read: {error.strerror}; its images would be missing"
    ) from error


class ImageFolderSource:
    name = "imagefolder"

    def __init__(self, root: Path, classes: tuple[str, ...], files: list[str], labels: list[int]):
        self._root, self.classes, self._files, self._labels = root, classes, files, labels
        self.settings: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._files)

    def label(self, number: int) -> int:
        return self._labels[number]

    def describe(self, number: int) -> str:
        return printable(self._files[number])

    def load(self, number: int) -> tuple[str, bytes]:
        path = self._root / self._files[number]
        try:
            return path.suffix[1:].lower(), read_file(path)
        except OSError as error:
            reason = why_unreadable(path, error)
            raise DamagedError(f"{printable(str(path))}: cannot be read: {reason}; mend that") from error
