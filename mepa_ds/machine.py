"""CPUs that this process may use, the memory that it has in use, and copies from it to a GPU.

Default numbers of workers and threads are made from the number of usable CPUs. `os.cpu_count` counts the machine's;
a job has fewer: by its affinity mask, by the quota of its control group (a container's), or by what SLURM gave it,
where the cluster trusts jobs to keep to that.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_CGROUPS = Path("/sys/fs/cgroup")
_CPUINFO = Path("/proc/cpuinfo")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def cpu_name() -> str:
    """Returns the processor's name, as its vendor writes it; its architecture where the system does not say."""
    with suppress(OSError):
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine


def usable_cpus() -> int:
    """CPUs for this process, at least 1; counted anew at every call. torchrun's ranks of a node share theirs."""
    tasks = _variable("SLURM_STEP_TASKS_PER_NODE") or 1
    of_task = [_variable("SLURM_CPUS_PER_TASK"), (_variable("SLURM_CPUS_ON_NODE") or 0) // tasks]
    ranks_of_task = max((_variable("LOCAL_WORLD_SIZE") or 1) // tasks, 1)  # srun may start a task for each rank
    return max(min([_affinity(), *filter(None, of_task), *_quotas()]) // ranks_of_task, 1)


def limit_threads() -> None:
    """Threads of PyTorch and others: no more than `usable_cpus`, unless the user says how many.

    OpenMP looks at the affinity mask, but knows neither quotas nor SLURM.
    """
    if "OMP_NUM_THREADS" in os.environ or (most := usable_cpus()) >= _affinity():
        return
    os.environ["OMP_NUM_THREADS"] = str(most)  # for what is loaded later, and processes that are started
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(min(most, torch.get_num_threads()))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _variable(name: str) -> int | None:
    """The number that a variable begins with: SLURM writes `8(x2)` for 8 on each of two nodes. 0 counts as none."""
    match = re.match(r"[0-9]{1,9}", os.environ.get(name, ""))
    return int(match[0]) or None if match else None


def _quotas() -> Iterator[int]:
    """CPUs by each quota over this process, a fraction rounded up. An unreadable file is no quota."""
    try:
        own = _OWN_CGROUPS.read_text()
    except OSError:
        return
    for line in own.splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:  # version 2
            for folder in _up_from(_CGROUPS, path):
                yield from _whole_cpus(_words(folder / "cpu.max"))
        elif "cpu" in controllers.split(","):
            for folder in _up_from(_CGROUPS / "cpu", path):  # a link where it is mounted together with cpuacct
                yield from _whole_cpus(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))


def _up_from(mount: Path, path: str) -> Iterator[Path]:
    """A group and those above it. In a container the path may be the host's, and only the mount be there."""
    parts = PurePosixPath(path.lstrip("/"))
    yield from (mount / part for part in (parts, *parts.parents))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _whole_cpus(quota_and_period: list[str]) -> Iterator[int]:
    if len(quota_and_period) == 2 and all(word.isdecimal() for word in quota_and_period):  # else none is set
        quota, period = map(int, quota_and_period)
        if quota and period:
            yield math.ceil(quota / period)


def keep_freed_memory() -> None:
    """For processes that compute on a CPU: what a step frees is kept for the next one.

    The C library maps large blocks one by one and gives them back at once; the kernel then clears every page of every
    gradient and activation again in each step. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def resident_bytes() -> int:
    """What is in memory now."""
    return _status_bytes("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that this program had in memory so far.

    Not `ru_maxrss`: that survives exec, so a process that a large one has started begins with the large one's peak.
    It stands in only where /proc does not say.
    """
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_bytes(key: str) -> int:
    """A size of /proc/self/status; 0 where there is none."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def copied_to(tensor: Tensor, device: torch.device, non_blocking: bool = True) -> Tensor:
    """Copies through pinned memory to a GPU: from other memory the copy would wait for all work queued there."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=non_blocking)
