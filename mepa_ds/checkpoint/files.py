"""The directory of a checkpoint: its content, checks of its integrity, its publication and its deletion.

A checkpoint is a directory `step_<number>`. It holds DCP files with every parameter's fp32 master and Adam moments,
`run.json` with everything else, and `manifest.json`, written last, with size and SHA-256 of all these files. The
directory is written under another name and renamed when complete, so a directory of this name was once whole.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mepa_ds import log
from mepa_ds.checkpoint.ownership import MANIFEST_NAME, check_ours, clear, discard, is_ours
from mepa_ds.checkpoint.progress import note_progress
from mepa_ds.checkpoint.state import RUN_NAME, RunState
from mepa_ds.errors import UserError
from mepa_ds.files import fsync_directory, sha256_of_file, write_json
from mepa_ds.safety.reading import read_json_object
from mepa_ds.safety.text import printable

_NAME = re.compile(r"step_(\d{8,})")
_FILE = re.compile(r"[\w.-]*\w", re.ASCII)
_DAMAGED = ".damaged"
# The names that a killed run may leave half-written or half-deleted. The training loop chooses the names of exports.
_UNFINISHED = re.compile(r"\.(step_\d{8,}|best|last|last_ema)\.(tmp|old|pruned)(\.left\d+)?")
_RETRY_SECONDS = 1.0


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def list_checkpoints(directory: Path) -> list[Path]:
    """Returns the completely written checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def complete(directory: Path, state: RunState, digests: dict[str, dict[str, Any]]) -> None:
    """Adds run.json and manifest.json to a directory of fragments; `digests` describe the ranks' files.

    Raises OSError when a rank's file is missing here, because its node then writes to another file system.
    """
    for name, expected in digests.items():
        if not (directory / name).exists() or (directory / name).stat().st_size != expected["bytes"]:
            raise OSError(f"{directory / name} was written by a rank, but is not there: output_dir must be shared")
    write_json(directory / RUN_NAME, asdict(state))
    for name in (RUN_NAME, ".metadata"):
        digests[name] = digest(directory / name)
    write_json(directory / MANIFEST_NAME, {"files": digests})


def digest(path: Path) -> dict[str, Any]:
    """Returns size and SHA-256 of a file in the form of the manifest."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    return sha256_of_file(path, lambda _: note_progress())


def find_damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """Compares size and SHA-256 of every `parts`-th file from number `part` on. Returns what is wrong, or None.

    A failed read is tried once more, because a temporary error of a file system is not damage.
    """
    for attempt in (1, 2):
        try:
            return _compare_with_manifest(checkpoint, part, parts)
        except OSError as error:
            if attempt == 2 or isinstance(error, FileNotFoundError):
                return f"{type(error).__name__}: {error}"
            time.sleep(_RETRY_SECONDS)
        except (KeyError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return None


def _compare_with_manifest(checkpoint: Path, part: int, parts: int) -> str | None:
    files = _listed(read_json_object(checkpoint / MANIFEST_NAME))
    for name in sorted(files)[part::parts]:
        found = os.lstat(checkpoint / name)
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is a link or no regular file"
        if found.st_size != files[name]["bytes"]:
            return f"{name} has {found.st_size} bytes, not {files[name]['bytes']}"
        if _sha256(checkpoint / name) != files[name]["sha256"]:
            return f"{name} is not what was written (SHA-256)"
    return None


def _listed(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a manifest. Raises ValueError for names that lead out of the checkpoint, and for no sizes."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not {RUN_NAME, ".metadata"} <= files.keys():
        raise ValueError(f"{MANIFEST_NAME} does not list the files of a checkpoint")
    for name, facts in files.items():
        if not _FILE.fullmatch(name):
            raise ValueError(f"{MANIFEST_NAME} lists {printable(name)[:100]!r}, no name of a checkpoint's file")
        if (
            not isinstance(facts, dict)
            or type(facts.get("bytes")) is not int
            or not isinstance(facts.get("sha256"), str)
        ):
            raise ValueError(f"{MANIFEST_NAME} has no size or SHA-256 of {name}")
    return files


def set_aside(checkpoint: Path) -> None:
    """Renames a damaged checkpoint, which keeps it for inspection but prevents its use and its counting."""
    target = checkpoint.with_name(checkpoint.name + _DAMAGED)
    clear(target)
    os.rename(checkpoint, target)


def publish(temporary: Path, target: Path) -> None:
    """Gives a complete directory its final name. An earlier directory of that name is deleted only afterwards.

    A link of that name (for example to another disk) is replaced, and its target stays: a directory can appear at once
    and complete only on the file system where it was written.

    Raises:
        FileExistsError: something is there that no run has written; it is left alone.
    """
    fsync_directory(temporary)
    check_ours(target)
    aside = target.with_name(f".{target.name}.old")
    clear(aside)
    if os.path.lexists(target):
        if target.is_symlink():
            log.note(
                f"warning: {target} was a link to {os.readlink(target)}, and is a directory now; what the link led to "
                "stays as it was"
            )
        os.rename(target, aside)
    os.rename(temporary, target)
    fsync_directory(target.parent)
    discard(aside)


def prune(directory: Path, keep: int, keep_every: int | None, keep_steps: Collection[int] = ()) -> None:
    """Deletes all checkpoints except the newest `keep`, those of every `keep_every`-th step, and `keep_steps`.

    A checkpoint that cannot be deleted stays, with one warning. So does what only has a checkpoint's name.
    """
    for old in list_checkpoints(directory)[:-keep]:
        if step_of(old) not in keep_steps and (keep_every is None or step_of(old) % keep_every):
            if not is_ours(old):
                _say_once(f"warning: {old} is not deleted: no run has written it")
                continue
            aside = old.with_name(f".{old.name}.pruned")
            try:
                clear(aside)
                os.rename(old, aside)
            except OSError as error:
                _say_once(f"warning: {old} cannot be deleted ({error.strerror}); log.keep_checkpoints asks for it")
            discard(aside)


@functools.cache
def _say_once(line: str) -> None:
    log.note(line)


def clean(directory: Path) -> None:
    """Removes what a killed run was writing or deleting, and nothing else."""
    for path in list(directory.glob(".*")):
        match = _UNFINISHED.fullmatch(path.name)
        if match is None:
            continue
        target = directory / match[1]
        if match[2] == "old" and match[3] is None and path.is_dir() and not target.exists():
            clear(target)  # a link whose target is missing
            os.rename(path, target)  # the run was killed between the two renames of `publish`
        elif not is_ours(path):
            _say_once(f"warning: {path} has a leftover's name, but no run has written it; it is left as it is")
        elif not discard(path):
            _say_once(f"warning: {path}, a leftover, cannot be removed; remove it when nothing uses it")


def check_exports(directory: Path, names: Collection[str]) -> None:
    """Raises UserError, before a run begins, where it could not export at its end: something foreign has the name."""
    for path in (directory / name for name in names):
        try:
            check_ours(path)
        except FileExistsError as error:
            raise UserError(f"output_dir: {path} {error.strerror}") from None
