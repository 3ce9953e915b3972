"""Any WebDataset: local tars, brace patterns, or URLs that webdataset can open."""

from __future__ import annotations

import glob
import hashlib
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand
from tqdm import tqdm

from data_tools.readers.imagefolder import EXTENSIONS
from data_tools.readers.source import COPIED_FROM
from data_tools.readers.tar_members import TarMembers
from data_tools.readers.text_lines import read_lines
from mepa_ds.cli.paths import PathOrName
from mepa_ds.data.index import INDEX_NAME, ShardIndex
from mepa_ds.data.remote import fetch, is_remote
from mepa_ds.data.shard_set import LABEL_EXTENSION, parse_label
from mepa_ds.data.tar import few, iterate_sample_members
from mepa_ds.errors import UserError

_MANY_CLASSES = 100_000
"""More than any known dataset has: a label from here on that even exceeds the number of images is a mistake."""


@dataclass(frozen=True)
class WebDataset:
    """Shards with an image and a `.cls` label (a number) a sample, to be shuffled, resized or cut anew."""

    shards: PathOrName
    """A directory, a glob, or a brace pattern such as /data/train-{0000..0099}.tar or https://host/{00..63}.tar."""
    classes: Path | None = None
    """Text file of class names, one a line in the order of the labels. By default those of an index.json beside the
    shards, or their numbers."""

    def open(self, scratch: Path | None) -> TarMembers:
        names = self._names()
        paths = [self._local(url, scratch) for url in self._urls()]
        source, ignored = TarMembers("webdataset", (), paths=paths), list[str]()
        for number in tqdm(range(len(paths)), "listing"):
            _list_tar(source, number, len(names or ()), ignored)
        if ignored:
            print(f"{self.shards}: {len(ignored)} members that belong to no sample are left out ({few(ignored)})")
        source.classes = names or _numbered_classes(source)
        if (copied_from := self.copied_from()) is not None:
            source.settings[COPIED_FROM] = copied_from
        return source

    def _names(self) -> tuple[str, ...] | None:
        if self.classes is not None:
            return tuple(read_lines(self.classes, "--classes"))
        directory = Path(self.shards)
        if is_remote(self.shards) or not (directory / INDEX_NAME).exists():
            return None
        return ShardIndex.read(directory, "--shards").classes or None

    def copied_from(self) -> str | None:
        if not is_remote(self.shards):
            return None
        return hashlib.sha256("\n".join(self._urls()).encode()).hexdigest()[:16]

    def _urls(self) -> list[str]:
        if is_remote(self.shards):
            return list(braceexpand(self.shards))
        if Path(self.shards).is_dir():
            found = sorted(str(path) for path in Path(self.shards).glob("*.tar"))
        else:
            found = [path for pattern in braceexpand(self.shards) for path in sorted(glob.glob(pattern)) or [pattern]]
        missing = [path for path in found if not Path(path).is_file()]
        if missing or not found:
            raise UserError(f"--shards: {(missing or [self.shards])[0]}: no tar files there")
        return found

    def _local(self, url: str, scratch: Path | None) -> Path:
        if not is_remote(url):
            return Path(url)
        if scratch is None:
            raise UserError("--shards: remote shards are copied first; run this in one part, without --num-parts")
        # Two URLs may end in one name, and what a killed build of other URLs left is not to be taken for these.
        return fetch(url, scratch / hashlib.sha256(url.encode()).hexdigest()[:12] / url.rpartition("/")[2])


def _numbered_classes(source: TarMembers) -> tuple[str, ...]:
    """ "0" to the highest label."""
    last = max(range(len(source)), key=source.label, default=None)
    if last is None:
        return ()
    if source.label(last) >= max(len(source), _MANY_CLASSES):
        raise UserError(
            f"--shards: {source.describe(last)}: label {source.label(last)} is far beyond the number of images "
            f"({len(source)}); mend it, or name the classes with --classes"
        )
    return tuple(str(label) for label in range(source.label(last) + 1))


def _list_tar(source: TarMembers, number: int, num_classes: int, ignored: list[str]) -> None:
    """Adds the samples of one tar."""
    path = source.paths[number]
    samples: dict[str, dict[str, tuple[str, int, int]]] = {}
    for key, extension, name, offset, size in iterate_sample_members(path, ignored):
        members = samples.setdefault(key, {})
        if extension in members:
            raise UserError(f"--shards: {path}: sample {key!r} comes twice; keys must be unique within a shard")
        members[extension] = (name, offset, size)
    with open(path, "rb") as file:
        for key, members in samples.items():
            image = next((members[extension] for extension in members if extension in EXTENSIONS), None)
            where = f"--shards: {path}: sample {key!r}"
            if image is None or LABEL_EXTENSION not in members:
                raise UserError(
                    f"{where}: has members {sorted(members)}; expected an image and a .{LABEL_EXTENSION} label"
                )
            _, offset, size = members[LABEL_EXTENSION]
            file.seek(offset)
            label = parse_label(file.read(size), num_classes, lambda where=where: where)  # type: ignore[misc]
            source.add(number, *image, label)
