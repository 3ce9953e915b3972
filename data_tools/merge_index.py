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

import tyro
from tqdm import tqdm

from data_tools.build_shards import DEFAULT_WORKERS
from data_tools.pool import unordered_map
from data_tools.readers.class_names import read_class_names
from data_tools.readers.patterns import check_files, expand_braces
from mepa_ds.cli import entry
from mepa_ds.config.base import validate
from mepa_ds.data.codecs import BASIS_NAME, pca_components
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
from mepa_ds.data.remote import REMOTE_NAME, RemoteShards, fetch, is_remote
from mepa_ds.data.tar import few, scan_tar
from mepa_ds.data.writer import PLAN_NAME, finish_index, read_npy_header, read_plan
from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file

_NPY_HEADER = 4096


@dataclass(frozen=True)
class CacheOptions:
    """How a remote set is kept at hand while it is used."""

    cache: str = "$TMPDIR/mepa_ds-shards-$UID"
    """Local directory for fetched shards, shared by the processes of a machine; variables are expanded there."""
    cache_gigabytes: float = 100.0
    """Of this set: shards that were used longest ago are removed when there is more."""
    window: int = 8
    """Shards that samples are shuffled over at a time; the cache must hold three windows."""

    def of(self, urls: list[str]) -> RemoteShards:
        return RemoteShards(
            urls=tuple(urls), cache=self.cache, cache_gigabytes=self.cache_gigabytes, window=self.window
        )


Cache = Annotated[CacheOptions, tyro.conf.arg(name="")]


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


@dataclass(frozen=True)
class Scan:
    """Index WebDataset shards that others made."""

    shards: tyro.conf.Positional[str]
    """A directory of tars, or a brace pattern of paths or URLs such as https://host/train-{0000..0099}.tar."""
    out: Path | None = None
    """Where index.json goes [default: the directory of the tars]; needed for URLs."""
    classes: Path | None = None
    """Text file of class names, one a line in the order of the labels, or a shard set that has them."""
    workers: int = DEFAULT_WORKERS
    """Processes."""
    cache: Cache = field(default_factory=CacheOptions)

    def __call__(self) -> ShardIndex:
        out, urls = self._places()
        classes = () if self.classes is None else read_class_names(self.classes, "--classes")
        _check_foreign(out)
        if is_remote(self.shards):
            _check_near(out)
        names = [url.rpartition("/")[2].partition(" ")[0] for url in urls]
        if len(set(names)) < len(names):
            raise UserError(f"{self.shards}: two shards have one file name; a set needs different names")
        out.mkdir(parents=True, exist_ok=True)
        scan = partial(_scan_shard, out)
        places = list(zip(urls, names, strict=True))
        found = {
            shard.entry.name: shard
            for shard in tqdm(unordered_map(scan, places, self.workers), "scanning", len(places))
        }
        members: dict[str, Member] = {}
        for shard in found.values():
            members.update(shard.members)
        if ignored := [name for shard in found.values() for name in shard.ignored]:
            print(f"{self.shards}: {len(ignored)} members that belong to no sample are left out ({few(ignored)})")
        index = ShardIndex(
            kind="images",
            shards=tuple(found[name].entry for name in names),
            members=members,
            classes=classes,
            made_by=FOREIGN,
        )
        if is_remote(self.shards):
            self.cache.of(urls).write(out)
        index.write(out)
        return index

    def _places(self) -> tuple[Path, list[str]]:
        if is_remote(self.shards):
            if self.out is None:
                raise UserError("--out: where should the index of these remote shards go?")
            return self.out, expand_braces(self.shards, "shards")
        if Path(self.shards).is_dir():
            directory, tars = Path(self.shards), sorted(str(path) for path in Path(self.shards).glob("*.tar"))
        else:
            tars = expand_braces(self.shards, "shards")
            directory = Path(tars[0]).parent
            if any(Path(tar).parent != directory for tar in tars):
                raise UserError(f"{self.shards}: lies in several directories; a set is one directory")
        check_files(tars or [str(directory)], "shards")
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


def _check_near(directory: Path) -> None:
    """Refuses to put the index of remote shards over a set that lies here."""
    indexed = any((directory / name).exists() for name in (INDEX_NAME, PLAN_NAME))
    if (indexed and not (directory / REMOTE_NAME).exists()) or any(directory.glob("*.tar")):
        raise UserError(f"--out: {directory}: holds a set of its own; give a new directory for the remote set's index")


@dataclass(frozen=True)
class _Scanned:
    entry: ShardEntry
    members: dict[str, Member]
    ignored: tuple[str, ...] = ()
    """Members that belong to no sample; not known of shards whose table was there already."""


def _scan_shard(out: Path, place: tuple[str, str]) -> _Scanned:
    url, name = place
    known = read_description(out / name) if not is_remote(url) else None
    # A tar that was written anew may have the size of the old one: tars are padded to 10 kB.
    is_newer = known is not None and table_path(out / name).stat().st_mtime_ns >= (out / name).stat().st_mtime_ns
    if known is not None and is_newer and known[0].sha256:
        return _Scanned(*known)
    if not is_remote(url):
        return _describe(out / name, out / name)
    with tempfile.TemporaryDirectory() as temporary:
        return _describe(fetch(url, Path(temporary) / name), out / name)


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
                try:
                    members[extension] = read_npy_header(file.read(_NPY_HEADER))[0]
                except ValueError as error:
                    raise UserError(
                        f"{path}: sample {table.key(row)!r}: .{extension} is no array: {error}; make the shard again"
                    ) from error
    entry_ = ShardEntry(
        name=shard.name,
        num_samples=len(table),
        bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        keys_sha256=keys_digest(table),
    )
    write_table(shard, table, entry_, members)
    return _Scanned(entry_, members, table.ignored)


@dataclass(frozen=True)
class Remote:
    """Use a set of this project's tools that lies behind a URL."""

    url: tyro.conf.Positional[str]
    """Of the set's directory; {} stands for the file's name where that is not at the end, as in
    'pipe:aws s3 cp s3://bucket/set/{} -'."""
    out: Path
    """Local directory for index.json, offsets and remote.json; give this one to the loader."""
    cache: Cache = field(default_factory=CacheOptions)

    def __call__(self) -> ShardIndex:
        if not is_remote(self.url):
            raise UserError(f"{self.url}: is no URL; a local set is used where it lies")
        _check_near(self.out)
        index = self._index()
        (self.out / INDEX_NAME).unlink(missing_ok=True)  # what is there may be of an older version of the set
        companions = [table_path(self.out / shard.name) for shard in index.shards]
        codec = index.made_by.settings.get("codec")
        if codec is not None and pca_components(codec) is not None:
            companions.append(self.out / BASIS_NAME)
        for path in tqdm(companions, "fetching offsets"):
            path.unlink(missing_ok=True)
            fetch(self._url(path.name), path)
        self.cache.of([self._url(shard.name) for shard in index.shards]).write(self.out)
        index.write(self.out)
        return index

    def _index(self) -> ShardIndex:
        url = self._url(INDEX_NAME)
        with tempfile.TemporaryDirectory() as temporary:
            data = fetch(url, Path(temporary) / INDEX_NAME).read_bytes()
        try:
            content = json.loads(data)
        except ValueError as error:  # such as the page that a web server shows for what it does not have
            raise UserError(f"{url}: is no index but {data[:40]!r}...; check the address of the set") from error
        return validate(ShardIndex, content, url)

    def _url(self, name: str) -> str:
        return self.url.replace("{}", name) if "{}" in self.url else f"{self.url.rstrip('/')}/{name}"


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
