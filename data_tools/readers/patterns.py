"""Brace patterns such as train-{0000..0099}.tar, with which users name many paths or URLs."""

from __future__ import annotations

import math
import re
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # its stub lacks the former

from mepa_ds.errors import UserError
from mepa_ds.files import why_unreadable

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
_MOST = 1_000_000


def expand_braces(pattern: str, option: str) -> list[str]:
    """The names that a pattern stands for. A pattern that is the name of an existing file stands for that file.

    Raises:
        UserError: a brace without its other half, or a pattern of more names than anybody has shards.
    """
    if Path(pattern).is_file():
        return [pattern]
    # braceexpand makes all numbers of a range before it gives the first.
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern)) > _MOST:
        raise UserError(f"{option}: {pattern}: stands for more than {_MOST} names; is a number wrong?")
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise UserError(
            f"{option}: {pattern}: a brace has no other half; write {{0000..0099}} for many, and \\{{ or \\}} for a "
            "brace that belongs to a name"
        ) from error


def check_files(paths: list[str], option: str, kind: str = "tar files") -> None:
    """Raises UserError, with the reason, unless all paths are of files."""
    for path in map(Path, paths):
        if not path.is_file():
            dangling = path.is_symlink() and not path.exists()
            reason = why_unreadable(path, FileNotFoundError()) if dangling else f"no {kind} there"
            raise UserError(f"{option}: {path}: {reason}")
