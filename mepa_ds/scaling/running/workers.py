"""Processes that train the runs of a study on this machine, each on cores of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from mepa_ds import distributed
from mepa_ds.errors import UserError
from mepa_ds.safety.places import open_to_append, real_directory

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Slot:
    """What one run may use: these cores, and these GPUs (none on a machine without)."""

    cores: tuple[int, ...]
    gpus: tuple[int, ...] = ()


@dataclass
class Worker:
    """A run at work."""

    name: str
    process: subprocess.Popen[bytes]
    slot: Slot
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


def start(name: str, recipe: Path, slot: Slot, ranks: int, log: Path) -> Worker:
    """Starts `mepa pretrain` on a recipe. Its output is added to `log`; it ends when this process is killed."""
    real_directory(log.parent, "output_dir")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "mepa_ds", "pretrain", str(recipe)]
    threads = str(max(len(slot.cores) // ranks, 1))
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": threads}
    if slot.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slot.gpus))
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def prepare() -> None:
        os.sched_setaffinity(0, slot.cores)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed in between
            os._exit(1)

    output = open_to_append(log)
    # A session of its own: Ctrl-C reaches this process alone, which asks each run once.
    process = subprocess.Popen(
        command, env=environment, stdout=output, stderr=output, start_new_session=True, preexec_fn=prepare
    )
    return Worker(name, process, slot, log, output)


def slots(jobs: int, ranks: int) -> list[Slot]:
    """Shares out the cores that this process may use, and its GPUs, `ranks` to a run.

    Raises:
        UserError: there are fewer GPUs than `jobs` runs need.
    """
    cores, gpus = sorted(os.sched_getaffinity(0)), torch.cuda.device_count() if distributed.uses_gpu() else 0
    if gpus and jobs * ranks > gpus:
        raise UserError(
            f"--jobs {jobs}: runs of {ranks} ranks each need {jobs * ranks} GPUs, and there are {gpus}; give fewer "
            f"jobs, or set {distributed.ACCELERATOR}=cpu to train on the CPU"
        )
    each = max(len(cores) // jobs, 1)
    return [
        Slot(
            tuple(cores[(number * each + k) % len(cores)] for k in range(each)),
            tuple(range(number * ranks, (number + 1) * ranks)) if gpus else (),
        )
        for number in range(jobs)
    ]


def last_lines(log: Path, count: int = 3) -> str:
    """Returns the end of a log, for a message."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [number for number, line in enumerate(lines) if line.startswith("error:")]
    return "\n  ".join(lines[errors[-1] :][:count] if errors else lines[-count:])
