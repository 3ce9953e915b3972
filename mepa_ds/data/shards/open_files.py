"""Files that stay open between reads, as many as the system allows.

In a true permutation every batch reads from hundreds of shards, so that a file that is closed is soon opened again; on
a network file system each time is a round trip to its metadata server.
"""

from __future__ import annotations

import os
import resource
import weakref
from collections import OrderedDict
from contextlib import suppress

from mepa_ds.safety.places import open_regular

_ENOUGH = 1 << 16
"""More shards than anybody has. Hard limits of a thousand million exist, and slow children that close every number."""


class OpenFile:
    """A file that is closed when its last reader lets go of it. A pipe or a device, which would never end, is refused
    (OSError)."""

    def __init__(self, path: str):
        self.descriptor = open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class OpenFiles:
    """The open files of one set, by number. All sets of a process share the number of files that it may open.

    A pickled copy is empty. Threads may share an instance.

    Args:
        most: largest number of open files of this set; None: as many as the system allows.
    """

    def __init__(self, most: int | None = None):
        self._most = most
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self.get = self._files.get
        raise_limit()
        _all.append(weakref.ref(self, _all.remove))

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int | None]]:
        return OpenFiles, (self._most,)

    def __len__(self) -> int:
        return len(self._files)

    def add(self, number: int, file: OpenFile) -> None:
        """Keeps a file open. If there are then too many, the set with the most open files drops its earliest one."""
        self._files[number] = file
        while self._most is not None and len(self) > self._most:
            self._drop_first()
        # There is no lock, since a fork could find it taken. Instead the list is copied; two threads at once may drop
        # one file too many.
        files = [found for ref in list(_all) if (found := ref()) is not None]
        for _ in range(sum(map(len, files)) - num_allowed()):
            max(files, key=len)._drop_first()

    def drop(self, number: int) -> None:
        """Forgets a file; the next reader opens it anew."""
        self._files.pop(number, None)

    def _drop_first(self) -> None:
        with suppress(KeyError):  # another thread has just dropped the last one
            self._files.popitem(last=False)


_all: list[weakref.ref[OpenFiles]] = []


def raise_limit() -> None:
    """Lets this process open as many files as it may, where the shell's own limit is lower (1024, usually)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def num_allowed() -> int:
    """Three quarters of the files that the process may open: the rest is for everything else in it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (_ENOUGH if soft == resource.RLIM_INFINITY else soft) * 3 // 4
