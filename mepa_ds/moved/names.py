"""Functions and classes that left their module before version 0.2, with the arguments that they had.

To be deleted with version 0.3.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _now(place: str) -> Any:
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(f"mepa_ds.{module}"), name)


def _fetch(url: str, path: Path) -> None:
    _now("data.remote.fetching.fetch")(url, path, lambda temporary, digest: None)


def _write_table(shard: Path, table: Any, entry: Any, members: Any) -> None:
    description = _now("data.shards.index.Description")(entry=entry, members=members)
    _now("data.shards.index.write_offset_index")(shard, table, description)


def _scan_tar(path: Path) -> Any:
    return _now("data.shards.offset_index.scan_tar")(path, "images")


NAMES: dict[str, dict[str, str | Callable[..., Any]]] = {
    "data.remote": {
        "fetch": _fetch,
        "RemoteShards": "data.remote.remote_file.RemoteShards",
        "ShardCache": "data.remote.shard_cache.ShardCache",
    },
    "engine.engine": {"_compile_blocks": "engine.compilation.compile_blocks"},
    "data.shards.index": {"write_table": _write_table},
    "data.shards.tar": {"SampleTable": "data.shards.offset_index.OffsetIndex", "scan_tar": _scan_tar},
}
"""Today's module under the old module's name -> what is no longer in it -> where that is, or how it is called now."""


def moved_name(module: str, name: str) -> Any:
    """For the `__getattr__` of `mepa_ds.<module>`. Raises AttributeError for what has never been there."""
    if (found := NAMES[module].get(name)) is None:
        raise AttributeError(f"module 'mepa_ds.{module}' has no attribute {name!r}")
    warnings.warn(f"mepa_ds.{module}.{name} has moved (CHANGELOG.md has the table)", DeprecationWarning, stacklevel=3)
    return _now(found) if isinstance(found, str) else found
