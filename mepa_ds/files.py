"""Files that appear only when complete, and digests of what is in them."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.safety.places import make_new, open_regular, temporary_name

if TYPE_CHECKING:  # who only writes text need not wait for torch
    from torch import Tensor

ResultT = TypeVar("ResultT")

_PROBE_BYTES = 4096  # an empty file has a place on a full disk too
_PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN)
"""What a network file system says while a server changes or a file is moved; the next try may find all well."""
_PAUSES = (0.1, 1.0)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields an empty temporary file beside `path`; on success it is fsynced and renamed, on failure removed.

    A reader of `path` sees the old content or the complete new one, whatever moment the process dies at. A link at
    `path` is replaced, not followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    make_new(temporary)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> bool:
    """Removes a file, a link (not what it leads to), or a directory with all that is in it; whether it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return not os.path.lexists(path)


def make_way(path: Path) -> None:
    """Afterwards nothing is at `path`. What cannot be removed (NFS keeps files that are open elsewhere) is renamed to
    `<path>.left<number>`, and told of.
    """
    if remove(path):
        return
    aside = rename_aside(path, "left")
    log.note(f"warning: {aside}: could not be removed, and is out of the way now; remove it when nothing uses it")


def rename_aside(path: Path, word: str) -> Path:
    """Renames `path` to `<path>.<word><number>`, the first that is free, and returns that."""
    names = (path.with_name(f"{path.name}.{word}{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(path, aside)
    return aside


def check_writable(directory: Path, option: str) -> None:
    """Makes the directory. Raises UserError, naming the option that gave it, when nothing can be written there."""
    probe = temporary_name(directory / "probe")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        make_new(probe)
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{option}: {directory}: cannot write there: {error.strerror or error}; make room, or choose another one"
        ) from error


def check_file_writable(path: Path, option: str) -> None:
    """`check_writable` of where a file is to be. Raises UserError also where its name is a directory's or a device's,
    which would be replaced."""
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "no regular file"
        raise UserError(f"{option}: {path} is {kind}; give the name of a file")
    check_writable(path.parent, option)


@contextmanager
def naming_full_disks(path: Path) -> Iterator[None]:
    """For tools: a full disk or quota met while `path` is written becomes a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{path}: the disk or quota is full ({error.strerror}); free some space there and run again: "
            "what is complete is kept"
        ) from error


@contextmanager
def naming_full_gpus(batch_size: int) -> Iterator[None]:
    """For tools: a GPU whose memory is too small becomes a UserError that says what to do."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory with {batch_size} images at once; use a smaller --batch-size") from error


def again(read: Callable[[], ResultT]) -> ResultT:
    """What `read` gives. It is called up to three times where a network file system may get over what it met.

    `read` opens its file itself: an open one stays stale.
    """
    for pause in _PAUSES:
        try:
            return read()
        except OSError as error:
            if not may_pass(error):
                raise
        time.sleep(pause)
    return read()


def may_pass(error: Exception) -> bool:
    """Whether a network file system may get over it."""
    return isinstance(error, OSError) and error.errno in _PASSING


def read_file(path: Path, most_bytes: int | None = None) -> bytes:
    """The content of a regular file, read by `again`.

    Raises:
        OSError: it cannot be read; a pipe or a device too, which would never end.
        ValueError: it has more than `most_bytes`.
    """
    return again(lambda: _read_file(path, most_bytes))


def _read_file(path: Path, most_bytes: int | None) -> bytes:
    with open(open_regular(path), "rb") as file:
        data = file.read(-1 if most_bytes is None else most_bytes + 1)
        if most_bytes is not None and len(data) > most_bytes:
            size = os.fstat(file.fileno()).st_size
            raise ValueError(f"it has {size} bytes, more than the {most_bytes} that are read")
        return data


def check_regular(path: Path) -> None:
    """Raises OSError for a pipe or a device, which some readers would wait for without end. What is not there passes:
    opening it says so."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def why_unreadable(path: Path, error: OSError) -> str:
    """What to tell of a file that could not be read: of a link, where it leads to."""
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return f"it is a link to {os.readlink(path)}, which is not there"
    return error.strerror or str(error)


def fsync_directory(path: Path) -> None:
    """Makes renames inside `path` durable, where the file system can (some that are no disks cannot)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_torch(path: Path, data: Any) -> None:
    """`torch.save`, atomically. A full disk is an OSError, as it is of all else that writes."""
    import torch

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(data, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def sha256_of_file(path: Path, on_chunk: Callable[[int], object] | None = None) -> str:
    """Hex digest of a file's bytes; `on_chunk` is called with the bytes read so far in each step (progress)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if on_chunk is not None:
                on_chunk(len(chunk))
    return digest.hexdigest()


def identity_of_weights(state: Mapping[str, Tensor]) -> str:
    """A short hash of names, shapes, types and values: by which shard sets and runs are compared."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
