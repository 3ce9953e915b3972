"""Checks a run's output_dir before training: it must be writable, unused by another start, and visible to all ranks."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from mepa_ds import distributed
from mepa_ds.errors import UserError
from mepa_ds.files import check_writable
from mepa_ds.runtime.run_lock import LOCK_NAME, RunLock
from mepa_ds.safety.places import make_new

# A network file system shows another node's new file late (NFS: by up to the age of its attribute cache).
_VISIBLE_SECONDS = 5.0
_WRITTEN = ("checkpoints", "samples", "reconstructions", "errors", "bad_batches", "tensorboard")


@contextmanager
def owned(directory: Path, prepare: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Locks a run's output_dir within the context, after the main rank has run `prepare`. Collective.

    The lock is needed because two starts would delete each other's files.

    Raises:
        UserError: on every rank, when another start is working in the directory, or a rank does not see it.
    """
    error: UserError | None = None
    lock, is_new = RunLock(directory), not directory.exists()
    if distributed.is_main():
        try:
            check_writable(directory, "output_dir")
            _refuse_links(directory)
            lock.take()
            prepare()
        except UserError as raised:
            error = raised
    try:
        distributed.agree(error)
        if distributed.world_size() > 1:
            _check_shared(directory)
        yield
    finally:
        if distributed.is_main():
            lock.release()
            with suppress(OSError):
                if is_new and os.listdir(directory) == [LOCK_NAME]:  # the start wrote nothing
                    (directory / LOCK_NAME).unlink()
                    directory.rmdir()


def _refuse_links(directory: Path) -> None:
    """Raises UserError where a directory that a run writes to, and deletes in, is a link."""
    for path in (directory / name for name in _WRITTEN):
        if path.is_symlink():
            raise UserError(
                f"output_dir: {path} is a link to {os.readlink(path)}, and a run neither writes nor deletes through "
                "links; name the place itself as output_dir, or remove the link"
            )


def _check_shared(directory: Path) -> None:
    """Checks that all ranks see the same directory, because every rank writes and reads its part of a checkpoint."""
    probe = directory / distributed.of_main(f".probe.{secrets.token_hex(8)}")
    if distributed.is_main():
        make_new(probe)
    dist.barrier()
    end = time.monotonic() + _VISIBLE_SECONDS
    while not probe.exists() and time.monotonic() < end:
        time.sleep(0.1)
    error: UserError | None = None
    if not probe.exists():
        error = UserError(
            f"output_dir: {directory}: node {socket.gethostname()} does not see what rank 0 writes there; "
            "it must lie on a file system that all nodes share"
        )
    try:
        distributed.agree(error)
    finally:
        if distributed.is_main():
            probe.unlink(missing_ok=True)
