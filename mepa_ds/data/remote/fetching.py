"""Files copied from URLs: whole and checked, or not at all; several at once, with a bar."""

from __future__ import annotations

import errno
import hashlib
import re
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mepa_ds.data.remote.openers import StoppedError, chunks_of
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.tar import list_members
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.files import atomic_path, naming_full_disks
from mepa_ds.progress import Progress
from mepa_ds.safety.reading import read_archive, read_json
from mepa_ds.safety.secrets import redacted

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Check = Callable[[Path, str], object]
"""Checks a copy before it gets its name: (path, SHA-256). Raises WrongContentError, or whatever reading raises."""

_ATTEMPTS = 3
_HEAD = 64
_PAUSE_SECONDS = 2.0
_AT_ONCE = 4
_MAY_NOT = (errno.EACCES, errno.EPERM, errno.EROFS)
_AGAIN = "check the address and the network, then try again"


class WrongContentError(Exception):
    """The fetched bytes are not what was asked for; the message says what they are."""


class TooMuchError(WrongContentError):
    """More bytes come than were asked for."""


@dataclass
class Transfer:
    """State shared by fetches that run at the same time."""

    num_bytes: int = 0
    """Bytes fetched so far, for a progress bar."""
    stop: threading.Event = field(default_factory=threading.Event)


def whole_tar(path: Path, _: str) -> None:
    """A check: every header of a tar, up to its end-of-archive mark."""
    try:
        list_members(path, LeftOut())
    except DamagedError as error:
        raise WrongContentError(_what_it_is(path) or str(error).removeprefix(f"{path}: ")) from error


def json_text(path: Path, _: str) -> None:
    try:
        read_json(path)
    except ValueError as error:
        raise WrongContentError(_what_it_is(path) or f"it is no JSON: {error}") from error


def whole_archive(path: Path, _: str) -> None:
    """A check for what NumPy stores: `.npz`, all of it."""
    try:
        with open(path, "rb") as file:
            read_archive(file)
    except (ValueError, OSError) as error:
        raise WrongContentError(_what_it_is(path) or f"it is no .npz file: {error}") from error


def content_of(sha256: str, num_bytes: int) -> Check:
    """A check against an index: by SHA-256 or, where the index has none, by size and that the tar is whole."""

    def check(path: Path, digest: str) -> None:
        if sha256 and digest == sha256:
            return
        size = path.stat().st_size
        if size != num_bytes:
            found = _what_it_is(path)
            raise WrongContentError(f"{f'{found}, ' if found else ''}it has {size} bytes, the index says {num_bytes}")
        if sha256:
            raise WrongContentError("its SHA-256 differs from the index's")
        whole_tar(path, digest)

    return check


def _what_it_is(path: Path) -> str | None:
    """Recognises, by its first bytes, what servers often send in place of data."""
    with open(path, "rb") as file:
        first = file.read(_HEAD)
    if not first:
        return "it is empty"
    if first.lstrip().startswith(b"<"):
        return f"a page came in its place ({first[:40]!r}...): does the address need a login, or has it expired?"
    if first.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "it is compressed, and samples are read by their place; unpack it first ('pipe:curl -sL URL | gunzip')"
    return None


def fetch(url: str, path: Path, check: Check, transfer: Transfer | None = None, most_bytes: int | None = None) -> None:
    """Copies what is at a URL to `path`; atomic, tried three times. Whatever the check refuses is thrown away.

    Args:
        most_bytes: a source that gives more is stopped there, and nothing of it is kept.

    Raises:
        DamagedError: it cannot be fetched, or is not what the check wants; the message holds no signature.
        StoppedError: `transfer.stop` was set.
        UserError: the disk is full (then its cause is the OSError).
    """
    transfer, refused = transfer or Transfer(), ""
    for attempt in range(_ATTEMPTS):
        if transfer.stop.wait(_PAUSE_SECONDS * attempt):
            raise StoppedError
        digest, complaints = "", list[str]()
        try:
            with naming_full_disks(path), atomic_path(path) as temporary:
                digest = _copy(url, temporary, transfer, complaints, most_bytes)
                check(temporary, digest)
            return
        except (UserError, StoppedError):
            raise
        except Exception as error:  # the openers raise whatever their transports do
            if isinstance(error, OSError) and error.errno in _MAY_NOT:
                remedy = "get the right to write there, or give another directory"
                raise UserError(f"{path.parent}: cannot write there: {error.strerror}; {remedy}") from None
            reason: Exception = error
            # The same bytes twice were not damaged on the way; and a source without end is not read three times.
            if (digest and digest == refused) or isinstance(error, TooMuchError):
                break
            refused = digest
    why = redacted(": ".join([str(reason) or type(reason).__name__, *complaints]))
    raise DamagedError(f"{redacted(url)}: cannot be fetched: {why}; {_remedy(reason)}") from None


def _remedy(reason: Exception) -> str:
    if isinstance(reason, WrongContentError):
        return "nothing of it was kept: " + _AGAIN
    if re.search(r"\b(401|403)\b", str(reason)):
        return "the address may need a login or have expired: get a new one, then try again"
    return _AGAIN


def _copy(url: str, path: Path, transfer: Transfer, complaints: list[str], most_bytes: int | None) -> str:
    digest, copied = hashlib.sha256(), 0
    chunks = chunks_of(url, transfer.stop, complaints, most_bytes)
    with open(path, "wb") as file, closing(chunks):
        for chunk in chunks:
            copied += len(chunk)
            if most_bytes is not None and copied > most_bytes:
                file.write(chunk[: _HEAD - min(copied - len(chunk), _HEAD)])  # to see what it is
                file.flush()
                found = _what_it_is(path)
                raise TooMuchError(f"{f'{found}, ' if found else ''}it has more than the {most_bytes} bytes expected")
            file.write(chunk)
            digest.update(chunk)
            transfer.num_bytes += len(chunk)
    return digest.hexdigest()


def fetch_all(work: Callable[[ItemT, Transfer], ResultT], items: Sequence[ItemT], what: str) -> list[ResultT]:
    """Runs `work` on all items, several at once, with a progress bar. Returns the results in the order of the items.

    After an error no further item is begun, and those under way are completed; Ctrl-C ends these too.

    Args:
        work: fetches one item with the given `Transfer`.
        what: what is done, as the bar says it.
    """
    transfer, pool = Transfer(), ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch")
    try:
        futures = [pool.submit(work, item, transfer) for item in items]
        waiting = set(futures)
        with Progress(total=len(items), desc=what, unit="file", disable=not items) as progress:
            while waiting:
                done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress.set_postfix_str(f"{transfer.num_bytes / 1e6:.0f} MB", refresh=sys.stderr.isatty())
                if done:
                    progress.update(len(done))
        return [future.result() for future in futures]
    except Exception:
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        transfer.stop.set()
        pool.shutdown(cancel_futures=True)
