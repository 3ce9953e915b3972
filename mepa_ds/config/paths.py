"""Paths as people write them, in recipes and on command lines."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mepa_ds.errors import UserError
from mepa_ds.safety.secrets import is_secret_name

_VARIABLE = re.compile(r"\$(?:(?P<plain>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\})", re.ASCII)


def expand_path(text: str) -> Path:
    """`~`, `~user`, `$NAME` and `${NAME}` are filled in, as a shell does; a relative path stays relative.

    Raises:
        ValueError: the path is empty, or has a variable without a value or with a secret, a user without a home, or a
            command in it. Taken literally it would be a directory called `~`, or the working directory.
    """
    if not text.strip():
        raise ValueError("an empty path; write . for the working directory")
    if "\0" in text:
        raise ValueError(f"{text!r} has a null byte in it, which no path may have")
    if "$(" in text or "`" in text:
        raise ValueError(f"{text!r} has a command in it, which only a shell runs; write the path out")
    for found in _VARIABLE.finditer(text):
        if is_secret_name(found["plain"] or found["braced"]):
            raise ValueError(f"{text!r}: {found[0]} holds a secret, and paths are seen by others; write the path out")
        if not os.environ.get(found["plain"] or found["braced"]):
            raise ValueError(f"{text!r}: the variable {found[0]} is not set here; set it, or write the path out")
    expanded = os.path.expanduser(os.path.expandvars(text))
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"{text!r}: there is no home directory of {user}; a name that begins with ~ is ./{user}")
    return Path(expanded)


def given_path(text: str, what: str) -> Path:
    """`expand_path` of what `what` gave. Raises UserError."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None
