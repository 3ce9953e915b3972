"""Text files that a user gives: labels, class names."""

from __future__ import annotations

from pathlib import Path

from mepa_ds.errors import UserError
from mepa_ds.files import read_file

_MOST_BYTES = 1 << 28


def read_lines(path: Path, option: str) -> list[str]:
    """Lines of a file given as `option`. Raises UserError if there is none, or if it is no text."""
    try:
        return read_file(path, _MOST_BYTES).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{option}: {path}: cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: {path}: is no UTF-8 text: {error}; save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{option}: {path}: {error}; give a list of names or labels") from error
