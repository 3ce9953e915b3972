"""The numbers of files and looks are those of real calls: of simulated loader ranks, and of real ranks' checkpoints."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.data.options import LoaderOptions
from mepa_ds.data.training import training_batches
from mepa_ds.data.training_sets import open_training_sets
from mepa_ds.distributed import Ranks as RankOf
from mepa_ds.planning.cluster.files import checkpoint_files, loader_files, resume_files
from tests.ranks import Ranks, arguments
from tests.tiny_run import make_run

_watched: list[tuple[str, Counter[str]]] = []
_is_hooked: list[bool] = []


def _note(event: str, args: tuple[Any, ...]) -> None:
    """Audit hooks stay for good; this one does nothing unless something is watched."""
    if event == "open" and isinstance(args[0], str):
        for folder, counts in _watched:
            counts["opened"] += folder in args[0]


@contextmanager
def counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts files opened below a folder, looks at what is there, and at files that are open."""
    counts: Counter[str] = Counter()
    if not _is_hooked:
        sys.addaudithook(_note)
        _is_hooked.append(True)
    stat, fstat = os.stat, os.fstat

    def looked(path: Any, *args: Any, **options: Any) -> os.stat_result:
        counts["looked_at"] += str(folder) in str(path)
        return stat(path, *args, **options)

    def asked(descriptor: int) -> os.stat_result:
        counts["looked_at"] += str(folder) in os.readlink(f"/proc/self/fd/{descriptor}")
        return fstat(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", looked)
        patched.setattr(os, "fstat", asked)
        _watched.append((str(folder), counts))
        yield counts
        _watched.pop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_run(folder, "train.steps=2", "log.checkpoint_every=2", "data.heldout_tokens=null")
    return folder


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_loaders_of_many_ranks_open_what_is_predicted(
    folder: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 samples in 3 shards, of which a rank of 8 does not meet all; an epoch of 5 global batches."""
    tokens, features = folder / "train.tokens", folder / "train.features"
    with counted(folder, monkeypatch) as counts:
        for rank in range(ranks):
            batches = training_batches(
                tokens,
                features,
                global_batch=8,
                seed=3,
                ranks=RankOf(rank, ranks),
                options=LoaderOptions(num_workers=0),
            )
            for _ in range(5):
                next(batches)
    sets = open_training_sets(tokens, features)
    work = loader_files(sets.tokens.shard_sizes, 2, 100.0, ranks, 8, seed=3)
    assert (counts["opened"], counts["looked_at"]) == (work.opened, work.looked_at)
    assert work.open_at_once == 6


def test_offset_indices_are_as_large_as_predicted(folder: Path) -> None:
    sizes = open_training_sets(folder / "train.tokens", None).tokens.shard_sizes
    on_disk = sum(path.stat().st_size for path in (folder / "train.tokens").iterdir() if path.suffix != ".tar")
    assert loader_files(sizes, 1, 0.0, 1, 8).bytes == pytest.approx(on_disk, rel=0.1)


def tell_opens() -> None:
    """Runs in each rank's process: says which files of checkpoints it opens, and whether to write."""

    def tell(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and "step_" in args[0]:
            os.write(2, f"opened {args[0]}\n".encode())

    sys.addaudithook(tell)


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_checkpoints_open_what_is_predicted(folder: Path, ranks: int) -> None:
    opened = []
    for steps in (2, 4):  # the second start resumes, and writes again
        log = folder / f"{ranks}.{steps}.log"
        words = arguments(folder, f"run{ranks}", f"train.steps={steps}")
        with Ranks(words, ranks, log, prepare=tell_opens) as started:
            assert started.wait() == [0] * ranks, log.read_text()
        opened.append([line for line in log.read_text().splitlines() if line.startswith("opened ")])
    print("\n".join(opened[1]))
    written, resumed = len(opened[0]), len(opened[1]) - len(opened[0])
    assert written == checkpoint_files(ranks, 1.0).opened
    assert resumed == resume_files(ranks, 1.0).opened
