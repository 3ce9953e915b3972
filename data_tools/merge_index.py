"""Writes the index of a shard set: `mepa data merge|scan|remote ...` (see --help).

merge   a job array left a set whose last part did not finish it: gather the parts, or say what is missing
scan    shards that others made: read their headers once, so that opening the set needs no scan; also for URLs
remote  a set that lies behind a URL: fetch its index, so that the loader can fetch its shards as it needs them
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes long to import
    from mepa_ds.interrupts import raise_interrupts

    raise_interrupts()

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.command_line.paths import PathOrName
from mepa_ds.data.remote.fetching import Transfer, fetch, fetch_all, whole_tar
from mepa_ds.data.remote.schemes import check_given
from mepa_ds.data.remote.urls import is_remote
from mepa_ds.data.shards.index import (
    FOREIGN,
    INDEX_NAME,
    Description,
    Member,
    ShardEntry,
    ShardIndex,
    is_plain,
    keys_digest,
    read_description,
    stored_description,
    why_not_plain,
    write_offset_index,
)
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.offset_index import scan_tar
from mepa_ds.data.shards.samples import tar_files
from mepa_ds.data.shards.writer import MANIFEST_NAME, finish_index, read_manifest
from mepa_ds.data_tools.pool import DEFAULT_WORKERS, unordered_map
from mepa_ds.data_tools.readers.class_names import read_class_names
from mepa_ds.data_tools.readers.patterns import check_files, expand_braces
from mepa_ds.data_tools.remote_index import Cache, CacheOptions, Remote, begin_scan, check_near, signed_anew
from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file
from mepa_ds.progress import Progress
from mepa_ds.safety.secrets import redacted


@dataclass(frozen=True)
class Merge:
    """Gather the shards that the parts of a job array wrote into index.json."""

    directory: tyro.conf.Positional[Path]
    """The set."""

    def __call__(self) -> ShardIndex:
        if not (self.directory / MANIFEST_NAME).exists():
            index = ShardIndex.read(self.directory)  # a UserError if there is nothing at all
            missing = [s.name for s in index.shards if read_description(self.directory / s.name) is None]
            if missing:
                raise UserError(f"{self.directory}: {len(missing)} shards are missing or torn, {missing[0]} among them")
            return index
        return finish_index(self.directory, read_manifest(self.directory))


@dataclass(frozen=True)
class Scan:
    """Write the index of WebDataset shards that others made."""

    shards: tyro.conf.Positional[PathOrName]
    """A directory of tars, or a brace pattern of paths or URLs such as https://host/train-{0000..0099}.tar."""
    out: Path | None = None
    """Where index.json goes [default: the directory of the tars]; needed for URLs."""
    classes: Path | None = None
    """Text file of class names, one a line in the order of the labels, or a shard set that has them."""
    workers: int = DEFAULT_WORKERS
    """Processes."""
    cache: Cache = field(default_factory=CacheOptions)

    def __call__(self) -> ShardIndex:
        left_out = LeftOut()
        out, urls = self._places(left_out)
        classes = () if self.classes is None else read_class_names(self.classes, "--classes")
        _check_foreign(out)
        if is_remote(self.shards):
            check_near(out)
            for url in urls:
                check_given(url, "shards")
            remote = self.cache.of(urls)
            if (index := signed_anew(out, remote, classes)) is not None:
                return index
            names = begin_scan(out, remote)
            scanned = fetch_all(partial(_scan_remote_shard, out), list(zip(urls, names, strict=True)), "scanning")
        else:
            names = [Path(path).name for path in urls]
            if foreign := next((name for name in names if not is_plain(name)), None):
                raise UserError(f"{out}: {why_not_plain(foreign)}, and scan again")
            if len(set(names)) < len(names):
                raise UserError(f"{self.shards}: two of these shards have the same name; names in a set are unique")
            scan = unordered_map(partial(_scan_shard, out), names, self.workers)
            scanned = list(Progress(scan, "scanning", len(names)))
        found = {shard.entry.name: shard for shard in scanned}
        members: dict[str, Member] = {}
        for name in names:
            members.update(found[name].members)
            left_out.update(LeftOut.from_json(found[name].left_out))
        shown = redacted(self.shards)
        if not any(shard.entry.num_samples for shard in found.values()):
            raise UserError(f"{shown}: no images found ({left_out or 'no members'}); give shards of images")
        left_out.note(shown)
        index = ShardIndex(
            kind="images",
            shards=tuple(found[name].entry for name in names),
            members=members,
            classes=classes,
            made_by=FOREIGN,
        )
        index.write(out)
        return index

    def _places(self, left_out: LeftOut) -> tuple[Path, list[str]]:
        if is_remote(self.shards):
            if self.out is None:
                raise UserError("--out: give a local directory for the index of these remote shards")
            return self.out, expand_braces(self.shards, "shards")
        if Path(self.shards).is_dir():
            directory, tars = Path(self.shards), [str(path) for path in tar_files(Path(self.shards), left_out)]
        else:
            tars = expand_braces(self.shards, "shards")
            directory = Path(tars[0]).parent
            if any(Path(tar).parent != directory for tar in tars):
                raise UserError(f"{self.shards}: lies in several directories; a set is one directory")
        check_files(tars or [str(directory)], "shards")
        if self.out not in (None, directory):
            raise UserError("--out: the index of local shards lies beside them; leave the option out")
        return directory, tars


def _check_foreign(directory: Path) -> None:
    """Refuses to replace the index of a set that this project's tools made, or are making."""
    if (directory / MANIFEST_NAME).exists():
        raise UserError(
            f"{directory}: holds a set that is not finished; run what writes it again, or `mepa data merge`"
        )
    if (directory / INDEX_NAME).exists() and (index := ShardIndex.read(directory)).made_by != FOREIGN:
        raise UserError(
            f"{directory}: holds {index.kind} made by {index.made_by.name!r}, whose index a scan would lose; "
            "use the set as it is, or check it with mepa data verify"
        )


def _scan_remote_shard(out: Path, place: tuple[str, str], transfer: Transfer) -> Description:
    url, name = place
    if (known := stored_description(out / name)) is not None:  # by an interrupted scan of these URLs
        return known
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / name
        fetch(url, path, whole_tar, transfer)
        return _describe(path, out / name, None)


def _scan_shard(out: Path, name: str) -> Description:
    shard = out / name
    known, mtime_ns = read_description(shard), shard.stat().st_mtime_ns
    # An offset index without a time is of a scan by another rule, or of a set whose index was removed.
    if known is not None and known.mtime_ns is not None and known.entry.sha256:
        return known
    return _describe(shard, shard, mtime_ns)


def _describe(path: Path, shard: Path, mtime_ns: int | None) -> Description:
    """Reads a tar's headers and writes its offset index beside `shard`. `mtime_ns`: of the tar before it is read."""
    offset_index = scan_tar(path, "images")
    description = Description(
        entry=ShardEntry(
            name=shard.name,
            num_samples=len(offset_index),
            bytes=path.stat().st_size,
            sha256=sha256_of_file(path),
            keys_sha256=keys_digest(offset_index),
        ),
        members={extension: Member() for extension in offset_index.extensions},
        mtime_ns=mtime_ns,
        left_out=offset_index.left_out.to_json(),
    )
    write_offset_index(shard, offset_index, description)
    return description


def main(argv: Sequence[str] | None = None, prog: str = "merge_index.py") -> None:
    commands = (
        Annotated[Merge, tyro.conf.subcommand("merge")]
        | Annotated[Scan, tyro.conf.subcommand("scan")]
        | Annotated[Remote, tyro.conf.subcommand("remote")]
    )
    command = tyro.cli(commands, prog=prog, args=argv, description=__doc__)
    log.make_stdout_a_log()
    index = command()
    log.say(f"{index.num_samples} {index.kind} in {len(index.shards)} shards, index.json written")


if __name__ == "__main__":
    entry.run(main)
