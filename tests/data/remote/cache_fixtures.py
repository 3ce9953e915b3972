"""Remote sets that are fetched by `cp` from beside, and caches of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mepa_ds.data.remote import fetching
from mepa_ds.data.remote.shard_cache import ShardCache
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.open_files import OpenFile
from mepa_ds.data_tools.remote_index import CacheOptions, Remote
from tests.data.shard_fixtures import make_set

SIZES = (3, 4, 2, 5, 3, 4)
SHARD_BYTES = 20_480  # the largest shard of tokens


def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_PAUSE_SECONDS", 0.0)


def make_remote(tmp_path: Path, kind: str = "tokens", cache_bytes: float = 1e9, window: int = 1) -> Path:
    """A remote set whose fetches are counted in `log`."""
    make_set(tmp_path / "far", kind, SIZES)
    options, out = CacheOptions(str(tmp_path / "cache"), cache_bytes / 1e9, window), tmp_path / f"near-{kind}"
    Remote(f"pipe:echo {{}} >> {tmp_path}/log; cat {tmp_path}/far/{{}}", out, options)()
    (tmp_path / "log").unlink()
    return out


def num_fetches(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().split()) if log.exists() else 0


def cache_of(remote: Path) -> ShardCache:
    cache = ShardSet(remote).cache
    assert cache is not None
    return cache


def content(file: OpenFile) -> bytes:
    return os.pread(file.descriptor, os.fstat(file.descriptor).st_size, 0)


def far(tmp_path: Path, shard: int) -> bytes:
    return (tmp_path / "far" / f"shard-{shard:06d}.tar").read_bytes()
