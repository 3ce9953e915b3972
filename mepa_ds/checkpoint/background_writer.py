"""Writes tensors to disk while training continues, and waits for ranks that read from disk.

The state is copied aside, which is the only time that training stands still. Then a thread writes it: each rank writes
its own pieces, and the main rank commits them, so that the result appears complete or not at all. A failed write (for
example to a full disk) is reported and leaves the earlier files in place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mepa_ds import distributed
from mepa_ds.checkpoint.files import digest
from mepa_ds.checkpoint.fragment import Fragment, WriteError
from mepa_ds.checkpoint.ownership import clear, discard
from mepa_ds.checkpoint.progress import progress_noted_by
from mepa_ds.safety import between_ranks

Digests = dict[str, dict[str, Any]]
FactT = TypeVar("FactT")
_PROGRESS_KEY, _TOLD_EVERY_SECONDS = "checkpoint progress", 0.5


@dataclass(frozen=True)
class Written:
    """The result of one task. Training stood still for `stalled_seconds`: copying, and waiting for an earlier task."""

    what: str
    error: str | None
    stalled_seconds: float
    write_seconds: float


class _Progress:
    """Counts the progress of all ranks in a task, so that a rank that is done early sees that the others are not stuck.

    The count is in the process group's store, because a collective would wait for the slow ranks.
    """

    def __init__(self) -> None:
        self._store = dist.distributed_c10d._get_default_store()
        self._told = 0.0

    def note(self) -> None:
        """Notes progress, and tells the other ranks at most twice a second."""
        now = time.monotonic()
        if now - self._told >= _TOLD_EVERY_SECONDS:
            self._told = now
            self._store.add(_PROGRESS_KEY, 1)

    def count(self) -> int:
        return self._store.add(_PROGRESS_KEY, 0)


class BackgroundWriter:
    """Runs one task at a time. Its collectives use their own CPU group, beside training's. Making one is collective.

    `beat` is called while this rank waits for a task, whenever any rank makes progress: a slow disk is not a hang.
    """

    def __init__(self, device: torch.device, beat: Callable[[], object] = lambda: None) -> None:
        self._device, self._beat = device, beat
        self._group: Any = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._done: list[Written] = []
        self._progress = _Progress()

    def submit(
        self,
        what: str,
        stage: Callable[[], list[Fragment]],
        temporary: Path,
        commit: Callable[[Digests], None],
        before: tuple[str, Callable[[], None]] | None = None,
    ) -> None:
        """Waits for the last task, stages the state, and starts to write into `temporary`. Collective.

        `commit` runs on the main rank when all files are written and synced, and gets their sizes and digests. `before`
        is a separately named task that the main rank runs on the same files right before `commit`. When it fails,
        `commit` still runs.
        """
        import mepa_ds.checkpoint.store  # noqa: F401 - at the first task and not at the start, but in the main thread

        started = time.perf_counter()
        self.wait()
        fragments = stage()
        stalled = time.perf_counter() - started

        def task() -> None:
            begun = time.perf_counter()
            if self._device.type == "cuda":  # a new thread starts on the first GPU, which may be another rank's
                torch.cuda.set_device(self._device)
            error = self._write(fragments, temporary, commit, before)
            self._done.append(Written(what, error, stalled, time.perf_counter() - begun))

        self._start(task)

    def _start(self, task: Callable[[], None]) -> None:
        def run() -> None:
            with progress_noted_by(self._progress.note):
                task()

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written."""
        seen = -1
        while self._thread is not None:
            self._thread.join(1.0)
            if not self._thread.is_alive():
                self._thread = None
                self._beat()
            elif (count := self._progress.count()) != seen:
                seen = count
                self._beat()

    def gather(self, action: Callable[[], FactT]) -> list[FactT]:
        """Runs `action` in the thread; returns its results from all ranks, in order of rank. Collective."""
        self.wait()
        errors: list[Exception] = []
        gathered: list[FactT] = []

        def task() -> None:
            try:
                gathered.extend(between_ranks.all_gather(action(), self._group))
            except Exception as error:
                errors.append(error)

        self._start(task)
        self.wait()
        if errors:
            raise errors[0]
        return gathered

    def written(self) -> list[Written]:
        """Returns the tasks that have ended since the last call."""
        done, self._done = self._done, []
        return done

    def _write(
        self,
        fragments: list[Fragment],
        temporary: Path,
        commit: Callable[[Digests], None],
        before: tuple[str, Callable[[], None]] | None,
    ) -> str | None:
        from mepa_ds.checkpoint.store import save_fragments

        try:
            self._on_main(lambda: _make_anew(temporary))
            save_fragments(fragments, temporary, self._group)
            digests = self._gather_digests(temporary)
            if before is not None:
                self._do_before(*before)
            self._on_main(lambda: commit(digests))
        except (_RemoteError, WriteError) as error:  # raised on every rank
            message = str(error)
        except Exception as error:  # a lost peer, for example; the main thread notices it in its own collectives
            message = f"rank {distributed.rank()}: {type(error).__name__}: {error}"
        else:
            return None
        if distributed.is_main():
            discard(temporary)
        return message

    def _do_before(self, what: str, action: Callable[[], None]) -> None:
        begun, error = time.perf_counter(), None
        try:
            self._on_main(action)
        except _RemoteError as raised:
            error = str(raised)
        self._done.append(Written(what, error, 0.0, time.perf_counter() - begun))

    def _on_main(self, action: Callable[[], None]) -> None:
        """Runs `action` on the main rank; an error there is raised on all ranks."""
        message: str | None = None
        if distributed.is_main():
            try:
                action()
            except Exception as error:  # the other ranks must learn of any error
                message = f"{type(error).__name__}: {error}"
        message = between_ranks.broadcast(message, self._group)
        if message is not None:
            raise _RemoteError(message)

    def _gather_digests(self, temporary: Path) -> Digests:
        """Returns, on every rank, the size and digest of all ranks' files."""
        own: Digests | str
        try:
            own = {path.name: digest(path) for path in temporary.glob(f"__{distributed.rank()}_*")}
        except OSError as error:
            own = f"rank {distributed.rank()}: {error}"
        merged: Digests = {}
        for part in between_ranks.all_gather(own, self._group):
            if isinstance(part, str):
                raise _RemoteError(part)
            merged |= part
        return merged


class _RemoteError(Exception):
    """A part of the write failed on some rank; raised on all ranks."""


def _make_anew(directory: Path) -> None:
    clear(directory)
    directory.mkdir(parents=True)
