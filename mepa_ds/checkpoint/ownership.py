"""Whether a run may delete what it finds under a name that it wants: only what it, or another run, has written.

A recipe may come from a stranger, and its output_dir be anything, such as a home directory with a `last` of its own.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from mepa_ds import log
from mepa_ds.files import make_way, remove, rename_aside
from mepa_ds.safety.reading import read_json_object

MANIFEST_NAME = "manifest.json"
_CONFIG_NAME = "config.json"
_EXPORTED = "next_scale_transformer"
_FILES = re.compile(
    r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|run\.json|manifest\.json|training\.json|config\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|\..*\.tmp|\.nfs\w+"
)
_WEIGHTS = "weights"
"""In what an export writes: the directory that is to be the export."""


def is_ours(path: Path) -> bool:
    """Whether what is there is a run's, whole or half-written, or a link, of which only itself would be deleted.

    A checkpoint has its manifest, an export says in its config.json what it is. Without them, all files must have names
    of a checkpoint's or an export's.
    """
    if path.is_symlink():
        return True
    if not path.is_dir():
        return False
    if (kind := _said(path / _CONFIG_NAME, "model_type")) is not None:
        return kind == _EXPORTED
    return isinstance(_said(path / MANIFEST_NAME, "files"), dict) or all(map(_has_our_name, os.scandir(path)))


def _has_our_name(entry: os.DirEntry[str]) -> bool:
    if entry.is_dir(follow_symlinks=False):
        return entry.name == _WEIGHTS and is_ours(Path(entry.path))
    return _FILES.fullmatch(entry.name) is not None


def _said(path: Path, key: str) -> object:
    try:
        return None if path.is_symlink() else read_json_object(path).get(key)
    except (OSError, ValueError):
        return None


def check_ours(path: Path) -> None:
    """Raises FileExistsError where something is that is not ours to delete."""
    if os.path.lexists(path) and not is_ours(path):
        raise FileExistsError(
            errno.EEXIST, "is there, and no run has written it; move it away, or choose another output_dir", str(path)
        )


def clear(path: Path) -> None:
    """Afterwards nothing is at `path`, the name of something temporary. What is not ours is renamed, and told of."""
    if not os.path.lexists(path) or is_ours(path):
        make_way(path)
        return
    aside = rename_aside(path, "foreign")
    log.note(f"warning: {path}: no run has written it; it is {aside} now")


def discard(path: Path) -> bool:
    """Removes a leftover if it is ours; returns whether it is gone."""
    return is_ours(path) and remove(path)
