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
from mepa_ds.data.remote import fetch, is_remote
from mepa_ds.data.shard_set import LABEL_EXTENSION, parse_label
from mepa_ds.data.tar import iterate_members, split_member_name
from mepa_ds.errors import UserError


@dataclass(frozen=True)
class WebDataset:
    """Shards with an image and a `.cls` label (a number) a sample, to be shuffled, resized or cut anew."""

    shards: str
    """A directory, a glob, or a brace pattern such as /data/train-{0000..0099}.tar or https://host/{00..63}.tar."""
    classes: Path | None = None
    """Text file of class names, one a line in the order of the labels. By default classes are named by their number."""

    def open(self, scratch: Path | None) -> TarMembers:
        paths = [self._local(url, scratch) for url in self._urls()]
        source = TarMembers("webdataset", (), paths=paths)
        names = None if self.classes is None else tuple(self.classes.read_text().splitlines())
        labels = [_list_tar(source, number, len(names or ())) for number in tqdm(range(len(paths)), "listing")]
        source.classes = names or tuple(str(label) for label in range(max(labels, default=-1) + 1))
        if (copied_from := self.copied_from()) is not None:
            source.settings[COPIED_FROM] = copied_from
        return source

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
        return fetch(url, scratch / url.rpartition("/")[2])


def _list_tar(source: TarMembers, number: int, num_classes: int) -> int:
    """Adds the samples of one tar; returns the highest label."""
    path, highest = source.paths[number], -1
    samples: dict[str, dict[str, tuple[str, int, int]]] = {}
    for name, offset, size in iterate_members(path):
        key, extension = split_member_name(name)
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
            highest = max(highest, label)
            source.add(number, *image, label)
    return highest
