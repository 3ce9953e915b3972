"""What a network file system gets over is no damage: the loader reads again, from a file opened anew."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mepa_ds.data.shard_set import ShardSet
from mepa_ds.errors import DamagedError
from mepa_ds.files import again
from tests.data.shard_fixtures import make_set, tokens_of


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mepa_ds.files._PAUSES", (0, 0))


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_stale_file_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    make_set(tmp_path, "tokens", [4])
    shards, out = ShardSet(tmp_path), np.empty((4, 5), np.uint16)
    shards.read_arrays(np.arange(4), "tokens.npy", out)
    ((_, stale),) = shards._files._files.items()
    preadv = os.preadv

    def of_another_server(descriptor: int, buffers: Any, offset: int) -> int:
        if descriptor == stale.descriptor:
            raise OSError(code, os.strerror(code))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", of_another_server)
    out[:] = 0
    shards.read_arrays(np.arange(4), "tokens.npy", out)
    assert out.tolist() == [tokens_of(number).tolist() for number in range(4)]


def test_what_stays_so_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path, "tokens", [4])
    shards, tries = ShardSet(tmp_path), list[int]()

    def fail(descriptor: int, *_: Any) -> int:
        tries.append(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(
        DamagedError, match=r"shard-000000\.tar: sample '000000002': cannot be read: Input/output error"
    ):
        shards.read(2)
    assert len(tries) == 3


def test_other_errors_are_not_tried_again() -> None:
    tries = list[int]()

    def fail() -> None:
        tries.append(1)
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        again(fail)
    assert len(tries) == 1
