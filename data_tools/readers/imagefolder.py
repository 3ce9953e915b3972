"""A folder of images with one sub-folder a class: ImageNet's layout, torchvision's ImageFolder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mepa_ds.data.left_out import few, printable
from mepa_ds.data.samples import is_hidden, is_image_name
from mepa_ds.errors import DamagedError, UserError


@dataclass(frozen=True)
class ImageFolder:
    """ROOT/CLASS/**/*.jpg: classes are the sub-folders in alphabetical order."""

    root: Path
    """The folder of class folders, such as ILSVRC2012/train."""

    def open(self, scratch: Path | None) -> ImageFolderSource:
        if not self.root.is_dir():
            raise UserError(f"--root: {self.root}: no such directory")
        _, folders, left_out = next(os.walk(self.root, onerror=_unreadable))
        classes = sorted(name for name in folders if not is_hidden(name))
        left_out += [f"{name}/" for name in folders if is_hidden(name)]
        if not classes:
            raise UserError(f"--root: {self.root}: has no class folders; expected ROOT/CLASS/IMAGE.jpg")
        files, labels, empty = list[str](), list[int](), list[str]()
        for label, name in enumerate(classes):
            found = sorted(_images_below(self.root, name, left_out))
            files += found
            labels += [label] * len(found)
            if not found:
                empty.append(name)
        if left_out:
            print(
                f"{self.root}: {len(left_out)} files or folders are left out: not named .jpg or the like, hidden, or "
                f"links to what is listed already ({few(left_out)})"
            )
        if empty:
            raise UserError(
                f"--root: {self.root}: {len(empty)} class folders have no images ({few(empty)}); "
                "fill or remove them: leaving them out silently would shift the labels"
            )
        return ImageFolderSource(self.root, tuple(classes), files, labels)


def _images_below(root: Path, name: str, left_out: list[str]) -> list[str]:
    """Paths of image files under a class folder, relative to the root. Links are followed, but not round and round."""
    found = list[str]()
    seen = {root.resolve(), *root.resolve().parents}
    for folder, folders, files in os.walk(root / name, onerror=_unreadable, followlinks=True):
        left_out += [f"{os.path.relpath(folder, root)}/{name}/" for name in folders if is_hidden(name)]
        # Of two links to one folder the same is taken on every file system.
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
            return path.suffix[1:].lower(), path.read_bytes()
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read: {error.strerror}") from error
