"""Any WebDataset: local tars, brace patterns, or URLs that webdataset can open."""

from __future__ import annotations

import glob
import hashlib
from dataclasses import dataclass
from pathlib import Path

from mepa_ds import log
from mepa_ds.command_line.paths import PathOrName
from mepa_ds.data.remote.fetching import Transfer, fetch, fetch_all, whole_tar
from mepa_ds.data.remote.schemes import check_given
from mepa_ds.data.remote.urls import file_names, is_remote, unsigned
from mepa_ds.data.shard_set import parse_label
from mepa_ds.data.shards.index import INDEX_NAME, ShardIndex
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.samples import LABEL_EXTENSION, image_samples, most_bytes, tar_files
from mepa_ds.data_tools.readers.class_names import read_class_names
from mepa_ds.data_tools.readers.patterns import check_files, expand_braces
from mepa_ds.data_tools.readers.source import COPIED_FROM
from mepa_ds.data_tools.readers.tar_members import TarMembers
from mepa_ds.errors import UserError
from mepa_ds.files import why_unreadable
from mepa_ds.progress import Progress
from mepa_ds.safety.secrets import redacted
from mepa_ds.safety.text import printable

_MANY_CLASSES = 100_000
"""More classes than any known dataset has. A label from here on that exceeds the number of images is a mistake."""


@dataclass(frozen=True)
class WebDataset:
    """Shards whose samples have an image and a `.cls` label (a number), to be shuffled, resized or cut anew."""

    shards: PathOrName
    """A directory, a glob, or a brace pattern such as /data/train-{0000..0099}.tar or https://host/{00..63}.tar."""
    classes: Path | None = None
    """Text file of class names, one a line in the order of the labels, or a shard set that has them. By default those
    of an index.json beside the shards, or their numbers."""

    def open(self, scratch: Path | None) -> TarMembers:
        names = self._names()
        left_out = LeftOut()
        paths = self._local_paths(scratch, left_out)
        source = TarMembers("webdataset", (), paths=paths)
        for number in Progress(range(len(paths)), "listing"):
            try:
                _list_tar(source, number, len(names or ()), left_out)
            except OSError as error:
                reason = why_unreadable(paths[number], error)
                raise UserError(f"--shards: {paths[number]}: cannot be read: {reason}; repair it") from error
        left_out.note(redacted(self.shards))
        source.classes = names or _numbered_classes(source)
        if (copied_from := self.copied_from()) is not None:
            source.settings[COPIED_FROM] = copied_from
        return source

    def _names(self) -> tuple[str, ...] | None:
        if self.classes is not None:
            return read_class_names(self.classes, "--classes")
        directory = Path(self.shards)
        if is_remote(self.shards) or not (directory / INDEX_NAME).exists():
            return None
        return ShardIndex.read(directory, "--shards").classes or None

    def copied_from(self) -> str | None:
        if not is_remote(self.shards):
            return None
        return hashlib.sha256("\n".join(map(unsigned, self._urls())).encode()).hexdigest()[:16]

    def _urls(self, left_out: LeftOut | None = None) -> list[str]:
        if is_remote(self.shards):
            urls = expand_braces(self.shards, "--shards")
            for url in urls:
                check_given(url, "--shards")
            return urls
        if Path(self.shards).is_dir():
            found = [str(path) for path in tar_files(Path(self.shards), left_out)]
        else:
            patterns = expand_braces(self.shards, "--shards")
            found = [path for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]
        check_files(found or [self.shards], "--shards")
        return found

    def _local_paths(self, scratch: Path | None, left_out: LeftOut) -> list[Path]:
        urls = self._urls(left_out)
        if not is_remote(self.shards):
            return [Path(url) for url in urls]
        if scratch is None:
            raise UserError("--shards: remote shards are copied first; run this in one part, without --num-parts")
        # Two URLs may end in one name, and files that a killed build of other URLs left must not be taken for these.
        folders = [scratch / hashlib.sha256(unsigned(url).encode()).hexdigest()[:12] for url in urls]
        paths = [folder / file_names([url])[0] for folder, url in zip(folders, urls, strict=True)]
        places = dict(zip(paths, urls, strict=True))  # a pattern may name a shard twice
        missing = [(url, path) for path, url in places.items() if not path.exists()]
        if len(missing) < len(places):
            log.say(f"{scratch}: {len(places) - len(missing)} of {len(places)} shards are copied already")
        fetch_all(_copy, missing, "copying shards")
        return paths


def _copy(place: tuple[str, Path], transfer: Transfer) -> None:
    url, path = place
    fetch(url, path, whole_tar, transfer)


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


def _list_tar(source: TarMembers, number: int, num_classes: int, left_out: LeftOut) -> None:
    """Adds the samples of one tar."""
    path = source.paths[number]
    samples = image_samples(path, left_out, dots_in_keys=True)
    with open(path, "rb") as file:
        for key, members in samples.items():
            where = f"--shards: {path}: sample {printable(key)!r}"
            if LABEL_EXTENSION not in members:
                raise UserError(
                    f"{where}: has members {sorted(members)}; expected an image and a .{LABEL_EXTENSION} label"
                )
            _, place = members.pop(LABEL_EXTENSION)
            file.seek(place.offset)
            data = file.read(min(place.size, most_bytes(LABEL_EXTENSION)))
            label = parse_label(data, num_classes, lambda where=where: where)  # type: ignore[misc]
            ((_, image),) = members.values()
            source.add(number, *image, label)
