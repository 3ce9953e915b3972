"""A run's checkpoints and weights after a power cut: what has its final name was on the disk before it got it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mepa_ds.checkpoint.files import checkpoint_name
from tests.ranks import Ranks, arguments
from tests.tiny_run import make_run


def trace(record: Path) -> None:
    """Runs in each rank's process before the run: notes every rename, and what of it had not been fsynced before.

    What was fsynced is told by inode and time of the last change: written to again, it would count as not fsynced.
    """
    synced: dict[tuple[int, int], int] = {}
    renamed: list[dict[str, Any]] = []
    fsync = os.fsync

    def noted_fsync(file: Any) -> None:
        fsync(file)
        status = os.fstat(file if isinstance(file, int) else file.fileno())
        synced[status.st_dev, status.st_ino] = status.st_mtime_ns
        for entry in renamed:
            if os.path.realpath(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}") == entry["parent"]:
                entry["durable"] = True
        record.write_text(json.dumps(renamed))

    def noted(rename: Callable[..., None], source: Any, target: Any, **values: Any) -> None:
        path = Path(source)
        inside = [path, *path.rglob("*")]
        states = {str(item): item.stat() for item in inside}
        missing = [name for name, s in states.items() if synced.get((s.st_dev, s.st_ino)) != s.st_mtime_ns]
        rename(source, target, **values)
        entry = {"target": str(target), "missing": missing, "parent": str(Path(target).parent.resolve())}
        renamed.append(entry | {"durable": False})
        record.write_text(json.dumps(renamed))

    os.fsync = noted_fsync  # type: ignore[assignment]
    os.rename, os.replace = partial(noted, os.rename), partial(noted, os.replace)


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path: Path) -> None:
    make_run(tmp_path, "train.steps=2", "log.checkpoint_every=1", "log.evaluate_every=2", "optim.ema=0.9")
    record = tmp_path / "renames.json"
    with Ranks(arguments(tmp_path, "run"), 1, tmp_path / "run.log", partial(trace, record)) as ranks:
        assert ranks.wait() == [0], ranks.log.read_text()
    renames = json.loads(record.read_text())
    found = {entry["target"]: entry for entry in renames}
    for name in (f"checkpoints/{checkpoint_name(1)}", f"checkpoints/{checkpoint_name(2)}", "best", "last", "last_ema"):
        entry = found[str(tmp_path / "run" / name)]
        assert entry["missing"] == [], f"{name}: renamed before these were fsynced"
        assert entry["durable"], f"{name}: its directory was not fsynced after the rename"
