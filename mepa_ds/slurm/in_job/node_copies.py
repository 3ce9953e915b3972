"""Copies shard sets to a node's own disk (staging to scratch).

`python -m mepa_ds.slurm.in_job.node_copies copy|overrides SCRATCH RECIPE [key=value ...]`

copy       copies the sets that the recipe names to SCRATCH, unless an earlier job left them there; one process a node
overrides  prints the key=value words that make the recipe read the copies: the same on every node

Others work on the node too. The copies are in a directory that only this user may enter, and one that an earlier job
left is compared with what it is a copy of before it is used. See docs/decisions.md, Copies on a node's disk.
"""

from __future__ import annotations

import errno
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
from mepa_ds.files import make_way, read_file
from mepa_ds.progress import Progress
from mepa_ds.safety.places import open_lock, private_directory
from mepa_ds.safety.reading import MOST_JSON_BYTES
from mepa_ds.safety.text import printable
from mepa_ds.slurm.in_job.copied_files import (
    copy_files,
    difference,
    indexed_digests,
    regular_files,
    write_record,
)
from mepa_ds.slurm.in_job.recipe_value import SET_KEYS, recipe_value

_INDEX, _REMOTE = "index.json", "remote.json"
_SPARE_BYTES = 2**30


def sets_to_copy(scratch: Path, recipe: Path, overrides: Sequence[str]) -> Iterator[tuple[str, Path, Path]]:
    """(key, set, its place on the node's disk) for every local set that the recipe names.

    The place is named by a hash of the set's index.json and path: a set that was made anew is copied anew, and two sets
    never share a copy.

    Raises:
        UserError: a set has no index, or a name that a batch script cannot pass on.
    """
    for key in SET_KEYS:
        value = recipe_value(key, recipe, overrides)
        if value is None:
            continue
        source = Path(value)
        if printable(source) != str(source):
            raise UserError(f"{key}: {source}: has a line break or control character in its name; rename it")
        if not (source / _INDEX).is_file():
            raise UserError(f"{key}: {source}: no {_INDEX} there; whole shard sets are copied")
        if (source / _REMOTE).exists():  # a remote set has a cache of its own
            continue
        try:
            index = read_file(source / _INDEX, MOST_JSON_BYTES)
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: {source / _INDEX}: cannot be read: {error}") from None
        digest = hashlib.sha256(index + b"\0" + os.fsencode(source.resolve())).hexdigest()
        name = source.name if source.name not in ("", "..") else source.resolve().name
        yield key, source, scratch / f"mepa_ds-{os.getuid()}" / "shards" / digest / (name or "set")


def copy_set(source: Path, target: Path) -> int:
    """Copies a set unless it is there; returns the bytes copied. Processes of one node wait for each other.

    Raises:
        UserError: the place belongs to somebody else, the disk is too small, or the set is not what its index says.
    """
    for folder in (target.parents[2], target.parents[1], target.parent):
        private_directory(folder, "MEPA_SCRATCH")
    with open_lock(target.parent / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files, digests = regular_files(source), indexed_digests(source / _INDEX)
        if os.path.lexists(target):
            if (trouble := difference(source, target, files, digests)) is None:
                return 0
            log.note(f"{target}: is no copy of {source} ({trouble}); it is copied again")
            make_way(target)
        size, free = sum(files.values()), shutil.disk_usage(target.parent).free
        if size + _SPARE_BYTES > free:
            raise UserError(
                f"{source} has {size / 1e9:.1f} GB, but {target.parent} only {free / 1e9:.1f} GB free; name a larger "
                "MEPA_SCRATCH or set MEPA_STAGE=off"
            )
        temporary = target.with_name(f".{target.name}.tmp")
        make_way(temporary)
        temporary.mkdir(mode=0o700)
        with Progress(total=size, unit="B", unit_scale=True, desc=f"copying {source.name}") as bar:
            write_record(target, copy_files(source, temporary, files, digests, bar.update))
        os.rename(temporary, target)
        return size


def main(argv: Sequence[str]) -> None:
    action, scratch, recipe, *overrides = argv
    node = os.environ.get("SLURMD_NODENAME", "here")
    for key, source, target in sets_to_copy(Path(scratch), given_path(recipe, "recipe"), overrides):
        if action == "overrides":
            log.answer(f"{key}={target}")
        elif copied := copy_set(source, target):
            log.say(f"{node}: {source} -> {target}, {copied / 1e6:.1f} MB", flush=True)
        else:
            log.say(f"{node}: {target} is there already", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        log.note(f"error: {os.environ.get('SLURMD_NODENAME', 'here')}: {error}")
        # A failing disk may be a fault of one node; a link in the lock's place is none.
        sys.exit(2 if isinstance(error, UserError) or error.errno == errno.ELOOP else 1)
