"""Text files that a user gives: labels, class names."""

from __future__ import annotations

from pathlib import Path

from mepa_ds.errors import UserError


def read_lines(path: Path, option: str) -> list[str]:
    """Lines of a file given as `option`. Raises UserError if there is none, or if it is no text."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{option}: {path}: cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: {path}: is no UTF-8 text: {error}; save it as UTF-8") from error
