"""Shard sets that lie elsewhere: a local directory with `index.json`, the offset indices and `remote.json`.

`remote.json` says where the tars are; `mepa data remote` and `scan` make it. Samples are then permuted
within windows of shards (mepa_ds.data.order), and a cache holds a few windows (mepa_ds.data.remote.shard_cache).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mepa_ds.config.base import Section, validate
from mepa_ds.config.values import PositiveInt
from mepa_ds.data.remote.urls import unsigned
from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path, naming_full_disks
from mepa_ds.safety.reading import read_json_object
from mepa_ds.safety.secrets import expanded_variables, redacted

REMOTE_NAME = "remote.json"


class RemoteShards(Section):
    """The content of `remote.json`."""

    urls: tuple[str, ...]
    """Where each shard of the index is, in the order of the index; with signatures, where those are needed."""
    cache: Annotated[str, Field(min_length=1)]
    """Directory for fetched tars; variables such as $TMPDIR and $UID are expanded where it is used."""
    cache_gigabytes: Annotated[float, Field(gt=0)]
    """Older shards are removed when the cache holds more."""
    window: PositiveInt
    """How many shards are shuffled together: the window of shards."""

    @property
    def directory(self) -> str:
        """`cache`, expanded as far as variables are set here."""
        text = self.cache.replace("$TMPDIR", tempfile.gettempdir()).replace("$UID", str(os.getuid()))
        return expanded_variables(text)

    @property
    def places(self) -> list[str]:
        """The URLs without signatures: equal when these are renewed."""
        return [unsigned(url) for url in self.urls]

    @classmethod
    def read(cls, directory: Path) -> RemoteShards | None:
        path = directory / REMOTE_NAME
        if not path.exists():
            return None
        try:
            data = read_json_object(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read: {error}; write it again, by `mepa data remote` or `scan`"
            ) from error
        try:
            return validate(cls, data, str(path))
        except UserError as error:  # its message shows what was given, signatures too
            raise UserError(redacted(str(error))) from None

    def write(self, directory: Path) -> None:
        """Writes `remote.json`; where its URLs give access, so that only its owner can read it."""
        path, gives_access = directory / REMOTE_NAME, list(self.urls) != self.places
        with naming_full_disks(path), atomic_path(path) as temporary:
            if gives_access:
                temporary.chmod(0o600)
            temporary.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")
