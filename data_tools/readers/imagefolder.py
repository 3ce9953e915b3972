"""A folder of images with one sub-folder a class: ImageNet's layout, torchvision's ImageFolder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mepa_ds.data.tar import DamagedError, printable
from mepa_ds.errors import UserError

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff"})


@dataclass(frozen=True)
class ImageFolder:
    """ROOT/CLASS/**/*.jpg: classes are the sub-folders in alphabetical order."""

    root: Path
    """The folder of class folders, such as ILSVRC2012/train."""

    def open(self, scratch: Path | None) -> ImageFolderSource:
        if not self.root.is_dir():
            raise UserError(f"--root: {self.root}: no such directory")
        classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        if not classes:
            raise UserError(f"--root: {self.root}: has no class folders; expected ROOT/CLASS/IMAGE.jpg")
        files, labels, empty = list[str](), list[int](), list[str]()
        for label, name in enumerate(classes):
            found = sorted(_images_below(self.root, name))
            files += found
            labels += [label] * len(found)
            if not found:
                empty.append(name)
        if empty:
            shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            raise UserError(
                f"--root: {self.root}: {len(empty)} class folders have no images ({shown}); "
                "fill or remove them: leaving them out silently would shift the labels"
            )
        return ImageFolderSource(self.root, tuple(classes), files, labels)


def _images_below(root: Path, name: str) -> list[str]:
    """Paths of image files under a class folder, relative to the root."""
    found = []
    for folder, _, files in os.walk(root / name, followlinks=True):
        relative = os.path.relpath(folder, root)
        found += [f"{relative}/{file}" for file in files if file.rpartition(".")[2].lower() in EXTENSIONS]
    return found


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
            return path.suffix[1:].lower(), path.read_bytes()
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read: {error.strerror}") from error
