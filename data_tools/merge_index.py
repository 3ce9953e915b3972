"""Writes the index of a shard set: `python data_tools/merge_index.py merge|scan|remote ...` (see --help).

merge   a job array left a set whose last part did not finish it: gather the parts, or say what is missing
scan    shards that others made: read their headers once, so that opening the set needs no scan; also for URLs
remote  a set that lies behind a URL: fetch its index, so that the loader can fetch its shards as it needs them
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from braceexpand import braceexpand
from tqdm import tqdm

from data_tools.pool import counting_workers, default_workers, unordered_map
from data_tools.readers.text_lines import read_lines
from data_tools.remote_index import Cache, CacheOptions, Remote, begin_scan, check_near, signed_anew
from mepa_ds.cli import entry
from mepa_ds.config.base import validate
from mepa_ds.data.fetching import Transfer, fetch, fetch_all, whole_tar
from mepa_ds.data.index import (
    FOREIGN,
    INDEX_NAME,
    Member,
    ShardEntry,
    ShardIndex,
    keys_digest,
    read_description,
    table_path,
    write_table,
)
from mepa_ds.data.tar import few, scan_tar
from mepa_ds.data.writer import PLAN_NAME, finish_index, read_npy_header, read_plan
from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file
from mepa_ds.urls import is_remote, redacted

_NPY_HEADER = 4096


@dataclass(frozen=True)
class Merge:
    """Gather the shards that the parts of a job array wrote into index.json."""

    directory: tyro.conf.Positional[Path]
    """The set."""

    def __call__(self) -> ShardIndex:
        if not (self.directory / PLAN_NAME).exists():
            index = ShardIndex.read(self.directory)  # a UserError if there is nothing at all
            missing = [s.name for s in index.shards if read_description(self.directory / s.name) is None]
            if missing:
                raise UserError(f"{self.directory}: {len(missing)} shards are missing or torn, {missing[0]} among them")
            return index
        return finish_index(self.directory, read_plan(self.directory))


@counting_workers
@dataclass(frozen=True)
class Scan:
    """Index WebDataset shards that others made."""

    shards: tyro.conf.Positional[str]
    """A directory of tars, or a brace pattern of paths or URLs such as https://host/train-{0000..0099}.tar."""
    out: Path | None = None
    """Where index.json goes [default: the directory of the tars]; needed for URLs."""
    classes: Path | None = None
    """Text file of class names, one a line in the order of the labels."""
    workers: int = field(default_factory=default_workers)
    """Processes."""
    cache: Cache = field(default_factory=CacheOptions)

    def __call__(self) -> ShardIndex:
        out, urls = self._places()
        classes = () if self.classes is None else tuple(read_lines(self.classes, "--classes"))
        _check_foreign(out)
        if is_remote(self.shards):
            check_near(out)
            remote = self.cache.of(urls)
            if (index := signed_anew(out, remote, classes)) is not None:
                return index
            names = begin_scan(out, remote)
            scanned = fetch_all(partial(_scan_remote_shard, out), list(zip(urls, names, strict=True)), "scanning")
        else:
            names = [Path(path).name for path in urls]
            if len(set(names)) < len(names):
                raise UserError(f"{self.shards}: names a shard twice; a set has each once")
            scan = unordered_map(partial(_scan_shard, out), names, self.workers)
            scanned = list(tqdm(scan, "scanning", len(names)))
        found = {shard.entry.name: shard for shard in scanned}
        members: dict[str, Member] = {}
        for shard in found.values():
            members.update(shard.members)
        if ignored := [name for shard in found.values() for name in shard.ignored]:
            shown = redacted(self.shards)
            print(f"{shown}: {len(ignored)} members that belong to no sample are left out ({few(ignored)})")
        index = ShardIndex(
            kind="images",
            shards=tuple(found[name].entry for name in names),
            members=members,
            classes=classes,
            made_by=FOREIGN,
        )
        index.write(out)
        return index

    def _places(self) -> tuple[Path, list[str]]:
        if is_remote(self.shards):
            if self.out is None:
                raise UserError("--out: where should the index of these remote shards go?")
            return self.out, list(braceexpand(self.shards))
        if Path(self.shards).is_dir():
            directory, tars = Path(self.shards), sorted(str(path) for path in Path(self.shards).glob("*.tar"))
        else:
            tars = list(braceexpand(self.shards))
            directory = Path(tars[0]).parent
            if any(Path(tar).parent != directory for tar in tars):
                raise UserError(f"{self.shards}: lies in several directories; a set is one directory")
        missing = [tar for tar in tars if not Path(tar).is_file()]
        if missing or not tars:
            raise UserError(f"{missing[0] if missing else directory}: no tar files there")
        if self.out not in (None, directory):
            raise UserError("--out: the index of local shards lies beside them; leave --out away")
        return directory, tars


def _check_foreign(directory: Path) -> None:
    """Refuses to replace the index of a set that this project's tools made, or are making."""
    if (directory / PLAN_NAME).exists():
        raise UserError(
            f"{directory}: holds a set that is not finished; run what writes it again, or `merge_index.py merge`"
        )
    if (directory / INDEX_NAME).exists() and (index := ShardIndex.read(directory)).made_by != FOREIGN:
        raise UserError(
            f"{directory}: holds {index.kind} made by {index.made_by.name!r}, whose index a scan would lose; "
            "use the set as it is, or check it with verify_shards.py"
        )


@dataclass(frozen=True)
class _Scanned:
    entry: ShardEntry
    members: dict[str, Member]
    ignored: tuple[str, ...] = ()
    """Members that belong to no sample; not known of shards whose table was there already."""


def _described(shard: Path) -> _Scanned | None:
    """What the table beside a remote shard says of it."""
    path = table_path(shard)
    if not path.exists():
        return None
    try:
        with np.load(path) as stored:
            description = json.loads(str(stored["description"]))
        members = {key: validate(Member, member, str(path)) for key, member in description["members"].items()}
        return _Scanned(validate(ShardEntry, description["entry"], str(path)), members)
    except Exception:  # zipfile and NumPy raise a dozen kinds for bytes that changed
        return None


def _scan_remote_shard(out: Path, place: tuple[str, str], transfer: Transfer) -> _Scanned:
    url, name = place
    if (known := _described(out / name)) is not None:  # by a scan of these URLs that was interrupted
        return known
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / name
        fetch(url, path, whole_tar, transfer)
        return _describe(path, out / name)


def _scan_shard(out: Path, name: str) -> _Scanned:
    known = read_description(out / name)
    # A tar that was written anew may have the size of the old one: tars are padded to 10 kB.
    is_newer = known is not None and table_path(out / name).stat().st_mtime_ns >= (out / name).stat().st_mtime_ns
    if known is not None and is_newer and known[0].sha256:
        return _Scanned(*known)
    return _describe(out / name, out / name)


def _describe(path: Path, shard: Path) -> _Scanned:
    """Reads a tar's headers and writes its table beside `shard`."""
    table = scan_tar(path)
    members: dict[str, Member] = {}
    with open(path, "rb") as file:
        for column, extension in enumerate(table.extensions):
            row = int((table.sizes_NM[:, column] >= 0).argmax())
            file.seek(int(table.offsets_NM[row, column]))
            members[extension] = Member()
            if extension.endswith("npy"):
                members[extension] = read_npy_header(file.read(_NPY_HEADER))[0]
    entry_ = ShardEntry(
        name=shard.name,
        num_samples=len(table),
        bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        keys_sha256=keys_digest(table),
    )
    write_table(shard, table, entry_, members)
    return _Scanned(entry_, members, table.ignored)


def main() -> None:
    commands = (
        Annotated[Merge, tyro.conf.subcommand("merge")]
        | Annotated[Scan, tyro.conf.subcommand("scan")]
        | Annotated[Remote, tyro.conf.subcommand("remote")]
    )
    index = tyro.cli(commands, prog="merge_index.py", description=__doc__)()
    print(f"{index.num_samples} {index.kind} in {len(index.shards)} shards, index.json written")


if __name__ == "__main__":
    entry.run(main)
