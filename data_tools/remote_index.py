"""Sets behind URLs, as `mepa data remote` makes them usable: indices, offset indices and remote.json."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from safetensors import SafetensorError, safe_open

from mepa_ds import log
from mepa_ds.config.base import validate
from mepa_ds.data.codecs import BASIS_NAME, pca_components
from mepa_ds.data.remote.fetching import Check, Transfer, WrongContentError, fetch, fetch_all, json_text, whole_archive
from mepa_ds.data.remote.remote_file import REMOTE_NAME, RemoteShards
from mepa_ds.data.remote.schemes import allow_these, check_given, how_to_allow, needs_word
from mepa_ds.data.remote.urls import file_names, is_remote
from mepa_ds.data.shards.index import (
    INDEX_NAME,
    MOST_OFFSET_BYTES,
    ShardEntry,
    ShardIndex,
    offset_index_path,
    parse_offset_index,
)
from mepa_ds.data.shards.offset_index import check_within
from mepa_ds.data.shards.writer import MANIFEST_NAME
from mepa_ds.errors import UserError
from mepa_ds.files import read_file
from mepa_ds.safety.reading import MOST_JSON_BYTES, read_json_object
from mepa_ds.safety.secrets import redacted

_MOST_BASIS_BYTES = 1 << 28
"""More than the 134 MB of a thousand components of a teacher 32 768 wide."""


@dataclass(frozen=True)
class CacheOptions:
    """How the shards of a remote set are cached while the set is used."""

    cache: str = "$TMPDIR/mepa_ds-shards-$UID"
    """Local directory for fetched shards, shared by the processes of a machine; variables are expanded there."""
    cache_gigabytes: float = 100.0
    """Largest size of this set's cache. Beyond it, the shards that were used longest ago are removed."""
    window: int = 8
    """How many shards are shuffled together (the window); the cache must hold three windows."""

    def of(self, urls: list[str]) -> RemoteShards:
        """The content of remote.json. The addresses are the user's, who is told if others will need consent."""
        if (scheme := needs_word(urls)) is not None:
            log.say(
                f"these shards are opened by {scheme}: addresses, which a data directory may not name by itself; to "
                f"use this set, {how_to_allow(scheme)}"
            )
        allow_these(urls)
        values = {"urls": urls, "cache": self.cache, "cache_gigabytes": self.cache_gigabytes, "window": self.window}
        return validate(RemoteShards, values, "options")


Cache = Annotated[CacheOptions, tyro.conf.arg(name="")]


def check_near(directory: Path) -> None:
    """Refuses a directory for the index of remote shards in which another set lies."""
    indexed = any((directory / name).exists() for name in (INDEX_NAME, MANIFEST_NAME))
    if (indexed and not (directory / REMOTE_NAME).exists()) or any(directory.glob("*.tar")):
        raise UserError(f"--out: {directory}: holds a set of its own; give a new directory for the remote set's index")


def begin_scan(out: Path, remote: RemoteShards) -> list[str]:
    """Names for the shards at these URLs, in a directory that is ready for their offset indices.

    remote.json is written first and index.json last: so a scan of the same URLs that was interrupted is known, and goes
    on with the offset indices that it has made. Those of another scan are removed.
    """
    names, begun = file_names(remote.urls), RemoteShards.read(out)
    if begun is None or begun.places != remote.places or (out / INDEX_NAME).exists():
        (out / INDEX_NAME).unlink(missing_ok=True)
        for name in names:
            offset_index_path(out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    remote.write(out)
    return names


def signed_anew(out: Path, remote: RemoteShards, classes: tuple[str, ...]) -> ShardIndex | None:
    """The existing index, if only the signatures of its URLs have changed; remote.json then gets the new ones."""
    before = RemoteShards.read(out)
    if before is None or before.urls == remote.urls or before.places != remote.places:
        return None
    if not (out / INDEX_NAME).exists():
        return None
    index = ShardIndex.read(out)
    if len(index.shards) != len(remote.urls) or index.classes != classes:
        return None
    remote.write(out)
    log.say(f"{out}: the same shards as before, signed anew; their index is kept")
    return index


@dataclass(frozen=True)
class Remote:
    """Use a set that lies behind a URL and that this project's tools made."""

    url: tyro.conf.Positional[str]
    """URL of the set's directory. {} stands for the file's name where the name is not at the end, as in
    'pipe:aws s3 cp s3://bucket/set/{} -'."""
    out: Path
    """Local directory for index.json, offsets and remote.json; give this one to the loader."""
    cache: Cache = field(default_factory=CacheOptions)

    def __call__(self) -> ShardIndex:
        if not is_remote(self.url):
            raise UserError(f"{self.url}: is no URL; a local set is used where it lies")
        check_near(self.out)
        check_given(self._url("x"), "url")
        index = self._index()
        (self.out / INDEX_NAME).unlink(missing_ok=True)  # what is there may be of an older version of the set
        for torn in self.out.glob(".*.tmp"):  # of an earlier start that was killed
            torn.unlink(missing_ok=True)
        fetch_all(self._fetch_offset_index, index.shards, "fetching offsets")
        codec = index.made_by.settings.get("codec")
        if codec is not None and pca_components(codec) is not None:
            fetch(self._url(BASIS_NAME), self.out / BASIS_NAME, _safetensors, None, _MOST_BASIS_BYTES)
        self.cache.of([self._url(shard.name) for shard in index.shards]).write(self.out)
        index.write(self.out)
        return index

    def _fetch_offset_index(self, shard: ShardEntry, transfer: Transfer) -> None:
        path = offset_index_path(self.out / shard.name)
        check = partial(_is_offset_index_of, shard)
        if not (shard.sha256 and _passes(check, path)):  # fetched by an earlier start
            fetch(self._url(path.name), path, check, transfer, MOST_OFFSET_BYTES)

    def _index(self) -> ShardIndex:
        url = self._url(INDEX_NAME)
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / INDEX_NAME
            fetch(url, path, json_text, None, MOST_JSON_BYTES)
            try:
                data = read_json_object(path)
            except ValueError as error:
                raise UserError(f"{url}: is no index of a shard set: {error}; give the URL of a set") from None
            return validate(ShardIndex, data, redacted(url))

    def _url(self, name: str) -> str:
        if "{}" in self.url:  # names in an index are plain, and quoted as if they were not
            return self.url.replace("{}", shlex.quote(name) if self.url.startswith("pipe:") else name)
        directory, mark, query = self.url.partition("?")
        return f"{directory.rstrip('/')}/{name}{mark}{query}"


def _is_offset_index_of(shard: ShardEntry, path: Path, digest: str) -> None:
    """A check: that this is the offset index of a shard, in the version that the index has."""
    whole_archive(path, digest)
    try:
        offset_index, description = parse_offset_index(read_file(path, MOST_OFFSET_BYTES))
        check_within(offset_index, shard.bytes, {})
    except ValueError as error:
        raise WrongContentError(f"it is no offset index of the shard: {error}") from error
    if description.entry != shard:
        raise WrongContentError("it is of another version of the shard than the index")


def _passes(check: Check, path: Path) -> bool:
    try:
        check(path, "")
    except Exception:  # whatever is wrong with the file, it is fetched again
        return False
    return True


def _safetensors(path: Path, _: str) -> None:
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise WrongContentError(f"it is no safetensors file: {error}") from error
