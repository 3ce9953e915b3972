"""Directories and files in places that others may reach: the temporary directory, a node's scratch, a group's disk.

Nothing here follows a link that somebody else may have put there, and names of temporary files cannot be foretold.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from mepa_ds.errors import UserError


def private_directory(path: Path, what: str) -> Path:
    """Makes a directory that only this user may enter, if it is not there. Its parent is made as usual.

    Args:
        what: the setting that gave the place, for messages.

    Raises:
        UserError: something else is there: a link, a file, or another user's directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            kind = "a directory of another user" if stat.S_ISDIR(found.st_mode) else "no directory of yours"
            raise UserError(f"{what}: {path} is {kind}; remove it, or give another place") from None
        if found.st_mode & 0o077:
            os.chmod(path, 0o700)
    return path


def real_directory(path: Path, what: str) -> Path:
    """Makes a directory, if it is not there, and what is above it.

    Args:
        what: the setting that gave the place, for messages.

    Raises:
        UserError: a link is there, which would have us write and delete elsewhere, or something else.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{what}: {path} is no directory; remove it, or choose another {what}") from None
    if path.is_symlink():
        raise UserError(
            f"{what}: {path} is a link to {os.readlink(path)}, and nothing is written through links there; remove it, "
            f"or choose another {what}"
        )
    return path


def user_directory(name: str) -> Path:
    """`private_directory` of this user in the temporary directory: `mepa_ds-<user number>/<name>`."""
    own = private_directory(Path(tempfile.gettempdir()) / f"mepa_ds-{os.getuid()}", "TMPDIR")
    return private_directory(own / name, "TMPDIR")


def is_own_file(descriptor: int) -> bool:
    """Whether an open file is a regular one of this user, that others cannot write."""
    found = os.fstat(descriptor)
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody can foretell; hidden, and ending in `.tmp`."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{secrets.token_hex(8)}.tmp")


def open_new(path: Path, mode: int = 0o666) -> IO[bytes]:
    """A new file to write. Raises FileExistsError if there is one, or a link that leads anywhere or nowhere."""
    return open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, mode), "wb")


def open_anew(path: Path, mode: int = 0o666) -> IO[bytes]:
    """A file to write in place of what has the name: a link is replaced, never followed. Not atomic.

    Raises:
        FileExistsError: another process has just made one.
    """
    with suppress(FileNotFoundError):
        os.unlink(path)
    return open_new(path, mode)


def make_new(path: Path, mode: int = 0o666) -> None:
    """Makes an empty file. Raises as `open_new`."""
    open_new(path, mode).close()


def open_regular(path: Path | str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """`os.open` of a regular file. Raises OSError (EINVAL) for a device or a pipe, which may never end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def open_no_link(path: Path, flags: int, mode: int = 0o666) -> int:
    """`open_regular` of what is no link, for which it raises OSError (ELOOP)."""
    return open_regular(path, flags | os.O_NOFOLLOW, mode)


def open_lock(path: Path, mode: int = 0o600) -> IO[bytes]:
    """The file of a lock, made if it is not there; its content stays. A link is not followed (OSError)."""
    return open(open_no_link(path, os.O_RDWR | os.O_CREAT, mode), "r+b", buffering=0)


def open_to_append(path: Path) -> IO[bytes]:
    """A log to append to, unbuffered, made if it is not there. A link in its place is replaced, never followed."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    try:
        descriptor = open_no_link(path, flags)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):
            raise
        os.unlink(path)
        descriptor = open_no_link(path, flags | os.O_EXCL)
    return open(descriptor, "ab", buffering=0)
