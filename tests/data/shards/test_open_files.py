"""Shards stay open, as many as the system allows to all sets together."""

from __future__ import annotations

import os
import pickle
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards import open_files
from mepa_ds.data.shards.open_files import OpenFile, OpenFiles
from tests.data.shard_fixtures import make_set, tokens_of


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    """What this process may open, put back after the test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 shards of one sample each."""
    directory = tmp_path_factory.mktemp("set")
    make_set(directory, "tokens", [1] * 150)
    return directory


def read_all(shards: ShardSet) -> None:
    out, order = np.empty((len(shards), 5), np.uint16), np.random.default_rng(0).permutation(len(shards))
    shards.read_arrays(order, "tokens.npy", out)
    assert out.tolist() == [tokens_of(int(number)).tolist() for number in order]


def test_a_shard_is_opened_once_although_the_shell_allows_few_files(
    shards: Path, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    opened: list[str] = []

    def noted(path: str) -> OpenFile:
        opened.append(path)
        return OpenFile(path)

    monkeypatch.setattr("mepa_ds.data.shard_set.OpenFile", noted)
    sets = [ShardSet(shards) for _ in range(3)]
    for _ in range(2):
        for one in sets:
            read_all(one)
    assert len(opened) == 3 * 150


def test_sets_share_what_is_allowed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two large sets and a small one, which keeps its files."""
    monkeypatch.setattr(open_files, "_all", [])
    monkeypatch.setattr(open_files, "num_allowed", lambda: 100)
    before = len(os.listdir("/proc/self/fd"))
    sets = [ShardSet(shards) for _ in range(3)]
    for number in range(20):
        sets[2].read(number)
    for _ in range(2):
        for one in sets[:2]:
            read_all(one)
            assert len(os.listdir("/proc/self/fd")) - before <= 100
    assert sorted(len(one._files) for one in sets) == [20, 40, 40]
    del sets[0]
    read_all(sets[0])
    assert len(sets[0]._files) == 80  # what the closed set had is free again


def test_threads_share_few_files(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "num_allowed", lambda: 3)
    sets = [ShardSet(shards) for _ in range(2)]
    errors: list[BaseException] = []

    def read(one: ShardSet) -> None:
        try:
            for _ in range(5):
                read_all(one)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(sets[number % 2],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_bound_of_its_own_and_pickling(tmp_path: Path) -> None:
    files = OpenFiles(most=2)
    for number in range(5):
        (tmp_path / str(number)).touch()
        files.add(number, OpenFile(str(tmp_path / str(number))))
    assert [files.get(number) is not None for number in range(5)] == [False, False, False, True, True]
    again = pickle.loads(pickle.dumps(files))
    assert len(again) == 0
    again.add(0, OpenFile(str(tmp_path / "0")))
    assert again.get(0) is not None
