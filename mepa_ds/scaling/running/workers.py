"""Processes that train the runs of a study on this machine, each on cores of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Worker:
    """A run at work."""

    name: str
    process: subprocess.Popen[bytes]
    cores: tuple[int, ...]
    log: Path
    output: IO[bytes]

    def ended(self) -> int | None:
        """Returns the exit status, or None while it works."""
        status = self.process.poll()
        if status is not None:
            self.output.close()
        return status

    def stop(self) -> None:
        """Asks the run to save and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


def start(name: str, recipe: Path, cores: Sequence[int], ranks: int, log: Path) -> Worker:
    """Starts `mepa pretrain` on a recipe. Its output is added to `log`; it ends when this process is killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "mepa_ds", "pretrain", str(recipe)]
    threads = str(max(len(cores) // ranks, 1))
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": threads}
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def prepare() -> None:
        os.sched_setaffinity(0, cores)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed in between
            os._exit(1)

    output = open(log, "ab")  # noqa: SIM115 - lives as long as the process
    # A session of its own: Ctrl-C reaches this process alone, which asks each run once.
    process = subprocess.Popen(
        command, env=environment, stdout=output, stderr=output, start_new_session=True, preexec_fn=prepare
    )
    return Worker(name, process, tuple(cores), log, output)


def core_sets(jobs: int) -> list[tuple[int, ...]]:
    """Shares out the cores that this process may use: `jobs` sets of equal size."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(len(cores) // jobs, 1)
    return [tuple(cores[(slot * each + k) % len(cores)] for k in range(each)) for slot in range(jobs)]


def last_lines(log: Path, count: int = 3) -> str:
    """Returns the end of a log, for a message."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [number for number, line in enumerate(lines) if line.startswith("error:")]
    return "\n  ".join(lines[errors[-1] :][:count] if errors else lines[-count:])
