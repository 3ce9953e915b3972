"""Copies shard sets to a node's own disk (staging to scratch).

`python -m mepa_ds.slurm.in_job.node_copies copy|overrides SCRATCH RECIPE [key=value ...]`

copy       copies the sets that the recipe names to SCRATCH, unless an earlier job left them there; one process a node
overrides  prints the key=value words that make the recipe read the copies: the same on every node

A copy's place is named by a hash of its index.json, so a set that was made anew is copied anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mepa_ds import log
from mepa_ds.config.paths import given_path
from mepa_ds.errors import UserError
from mepa_ds.files import make_way
from mepa_ds.progress import Progress
from mepa_ds.slurm.in_job.recipe_value import SET_KEYS, recipe_value

_INDEX, _REMOTE = "index.json", "remote.json"
_SPARE_BYTES = 2**30


def sets_to_copy(scratch: Path, recipe: Path, overrides: Sequence[str]) -> Iterator[tuple[str, Path, Path]]:
    """(key, set, its place on the node's disk) for every local set that the recipe names."""
    for key in SET_KEYS:
        value = recipe_value(key, recipe, overrides)
        if value is None:
            continue
        source = Path(value)
        if not (source / _INDEX).is_file():
            raise UserError(f"{key}: {source}: no {_INDEX} there; whole shard sets are copied")
        if (source / _REMOTE).exists():  # a remote set has a cache of its own
            continue
        digest = hashlib.sha256((source / _INDEX).read_bytes()).hexdigest()[:16]
        yield key, source, scratch / "mepa_ds-shards" / digest / source.name


def copy_set(source: Path, target: Path) -> int:
    """Copies a set unless it is there; returns the bytes copied. Processes of one node wait for each other."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return 0
        files = sorted(path for path in source.iterdir() if path.is_file() and not path.name.startswith("."))
        size = sum(path.stat().st_size for path in files)
        free = shutil.disk_usage(target.parent).free
        if size + _SPARE_BYTES > free:
            raise UserError(
                f"{source} has {size / 1e9:.1f} GB, but {target.parent} only {free / 1e9:.1f} GB free; name a larger "
                "MEPA_SCRATCH or set MEPA_STAGE=off"
            )
        temporary = target.with_name(f".{target.name}.tmp")
        make_way(temporary)
        temporary.mkdir()
        with Progress(total=size, unit="B", unit_scale=True, desc=f"copying {source.name}") as bar:
            for path in files:
                shutil.copyfile(path, temporary / path.name)
                bar.update(path.stat().st_size)
        os.rename(temporary, target)
        return size


def main(argv: Sequence[str]) -> None:
    action, scratch, recipe, *overrides = argv
    for key, source, target in sets_to_copy(Path(scratch), given_path(recipe, "recipe"), overrides):
        if action == "overrides":
            log.answer(f"{key}={target}")
        elif copied := copy_set(source, target):
            log.say(
                f"{os.environ.get('SLURMD_NODENAME', 'here')}: {source} -> {target}, {copied / 1e6:.1f} MB", flush=True
            )
        else:
            log.say(f"{os.environ.get('SLURMD_NODENAME', 'here')}: {target} is there already", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        log.note(f"error: {os.environ.get('SLURMD_NODENAME', 'here')}: {error}")
        sys.exit(2 if isinstance(error, UserError) else 1)  # a failing disk may be a fault of one node
