"""Ends a run between two steps, on all ranks at once, after a signal or before the time runs out.

After SIGUSR1, SIGTERM, SIGINT (Ctrl-C) or SIGHUP on any rank, the step still ends, and so does the next one if it was
the step in which the signal came, since ranks are asked when a step begins. Then all ranks save a checkpoint and exit
with REQUEUE_EXIT_CODE. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from mepa_ds import distributed, log
from mepa_ds.interrupts import blocked, handled, same_request_seconds, to_go_on

# EX_TEMPFAIL of sysexits.h: the run is not finished, and continues when it is started again.
REQUEUE_EXIT_CODE = 75
JOB_END = "SLURM_JOB_END_TIME"


class StopRequests:
    """This rank's reasons to stop. Signals are noted as soon as an object is made, which must be in the main thread."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._deadline: tuple[float, str] | None = None
        # Python runs handlers only between byte codes of the main thread, which may wait in a collective for minutes.
        # The C part of a handler writes to this socket at once, even while the main thread waits.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._signals = handled()
        for number in self._signals:
            signal.signal(number, _noted)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop; None if it does not."""
        if self._reason is None and self._deadline is not None and time.time() >= self._deadline[0]:
            self._reason = self._deadline[1]
        return self._reason

    def stop_at(self, deadline: tuple[float, str] | None) -> None:
        """Sets a deadline: a time (Unix seconds) at which to stop, and the reason; None: no deadline."""
        self._deadline = deadline

    def _listen(self) -> None:
        first: float | None = None
        while True:
            received = [number for number in self._reader.recv(64) if number in self._signals]
            if not received:
                continue
            name, now = signal.Signals(received[0]).name, time.monotonic()
            if first is None:
                first, self._reason = now, name
                if distributed.read_launch().is_main:
                    log.note(f"{name}: the step ends, the run is saved and stops; a second signal ends it at once")
            elif now - first > same_request_seconds():
                log.note(f"{name}: ended at once")
                os._exit(128 + received[0])


def _noted(number: int, frame: object) -> None:
    """Does nothing, since the listener handles the signal. Without a Python handler it would end the process."""


# Blocks signals in the main thread, while the thread of StopRequests still notes them. A signal would cut short
# PyTorch's pause between two attempts to reach rank 0's store. PyTorch would then print a stack and try again only some
# 10 s later, and an allocation that is ending may not have 10 s.
undisturbed = blocked


def stopped(step: int, num_steps: int, reason: str | None, from_step: int | None) -> str:
    """Returns the last line of a stopped run. `from_step` is the step of its last checkpoint; None: there is none."""
    line = f"stopped at step {step} of {num_steps} ({reason or 'another rank was asked to stop'}); start again to go on"
    if from_step is None:
        line += " from the beginning: there is no checkpoint (the checkpoint of this step could not be written)"
    elif from_step != step:
        line += f" from step {from_step}, the last checkpoint (the checkpoint of this step could not be written)"
    return line + to_go_on()


def deadline(
    time_limit: float | None, stop_before_end: float | None, environment: Mapping[str, str]
) -> tuple[float, str] | None:
    """Returns the earlier of two deadlines, with its reason; None if there is neither.

    One is `time_limit` minutes from now, the other is `stop_before_end` minutes before the SLURM job's end.
    """
    candidates = []
    if time_limit is not None:
        candidates.append((time.time() + 60 * time_limit, f"guards.time_limit of {time_limit:g} minutes"))
    job_end = environment.get(JOB_END)
    if stop_before_end is not None and job_end is not None:
        reason = f"the allocation ends in {stop_before_end:g} minutes"
        candidates.append((float(job_end) - 60 * stop_before_end, reason))
    return min(candidates, default=None)


class Agreement:
    """Finds out whether any rank wants to stop, by a small all-reduce per step that runs while the step is computed.

    The all-reduce runs over a CPU group (gloo) beside NCCL's group, so that no GPU waits for it.
    """

    def __init__(self, requests: StopRequests):
        self._requests = requests
        self._group: dist.ProcessGroup | None = None
        if distributed.world_size() > 1:
            self._group = dist.new_group(backend="gloo")  # type: ignore[assignment]
        self._wanted = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def begin(self) -> None:
        """Sends out, before a step, whether this rank wants to stop. Collective."""
        self._wanted.fill_(self._requests.reason is not None)
        if self._group is not None:
            self._work = dist.all_reduce(self._wanted, dist.ReduceOp.MAX, self._group, async_op=True)

    def end(self) -> bool:
        """Returns, after the step, whether any rank wants to stop: the same answer on every rank."""
        if self._work is not None:
            self._work.wait()
        return bool(self._wanted)
