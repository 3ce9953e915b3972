"""CPUs, threads, memory, GPUs, compilers, disks of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from mepa_ds.doctor.finding import Finding, note, ok, problem
from mepa_ds.files import check_writable
from mepa_ds.machine import cpu_name, usable_cpus

_GB = 1e9
_LITTLE_MEMORY, _LITTLE_DISK, _LITTLE_SHARED = 4 * _GB, 5 * _GB, 1 * _GB


def look_at_computer(threads: str | None) -> Iterator[Finding]:
    """Yields findings; `threads`: OMP_NUM_THREADS, None where it is not set."""
    yield from _cpus(threads)
    yield from _memory()
    yield from _gpus()
    yield from _compilers()
    yield from _disks()


def _cpus(threads: str | None) -> Iterator[Finding]:
    usable = usable_cpus()
    text = f"{usable} of {os.cpu_count()} cores may be used; {cpu_name()}"
    yield ok("cpu", text)
    if threads is None:
        yield ok("threads", f"OMP_NUM_THREADS is not set: {usable} threads a process, 1 a rank under torchrun")
    elif not (outer := threads.partition(",")[0]).isdigit() or int(outer) < 1:
        yield problem("threads", f"OMP_NUM_THREADS={threads} is no number above 0", "run: unset OMP_NUM_THREADS")
    elif int(outer) > usable:
        text = f"OMP_NUM_THREADS={threads}, but only {usable} cores may be used: threads wait for each other"
        yield note("threads", text, f"run: export OMP_NUM_THREADS={usable}")
    else:
        yield ok("threads", f"OMP_NUM_THREADS={threads}")


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    text = f"{memory.available / _GB:.1f} of {memory.total / _GB:.1f} GB are free"
    if memory.available < _LITTLE_MEMORY:
        yield note("memory", text, "end other programs, or start fewer ranks and --workers; each takes about 1 GB")
    else:
        yield ok("memory", text)


def _gpus() -> Iterator[Finding]:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        if not driver:
            yield ok("gpu", "none: commands run on the CPU")
        elif torch.version.cuda is None:
            text = f"there are GPUs (driver {driver}), but this torch is built without CUDA"
            yield problem("gpu", text, "install a torch with CUDA: https://pytorch.org/get-started/locally")
        else:
            text = f"torch for CUDA {torch.version.cuda} cannot use the GPUs of driver {driver}"
            yield problem("gpu", text, "update the driver, install a torch for it, or look at CUDA_VISIBLE_DEVICES")
        return
    for number in range(torch.cuda.device_count()):
        yield from _gpu(number)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
    text = f"CUDA {torch.version.cuda}, driver {driver or 'unknown'}, NCCL {nccl or 'missing'}"
    if nccl:
        yield ok("cuda", text)
    else:
        yield problem("cuda", text, "several GPUs need a torch that is built with NCCL")


def _gpu(number: int) -> Iterator[Finding]:
    about = f"gpu {number}"
    try:
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        torch.ones(8, device=f"cuda:{number}").sum().item()
    except RuntimeError as error:
        text = f"does not compute: {' '.join(str(error).split())[:200]}"
        yield problem(about, text, "restart the machine or leave the GPU out by CUDA_VISIBLE_DEVICES")
        return
    text = f"{properties.name}, {free / _GB:.1f} of {total / _GB:.1f} GB are free"
    if free < 0.5 * total:
        yield note(about, text, "another program uses it (nvidia-smi names it); end it, or use another GPU")
    elif properties.major < 8:
        yield note(about, f"{text}; it has no bf16", "set parallel.precision: fp16 or fp32")
    else:
        yield ok(about, text)


def _compilers() -> Iterator[Finding]:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        text = "no C++ compiler: blocks run uncompiled, and DeepSpeed cannot build its fused optimizer"
        yield note("compiler", text, "install g++ (Debian: apt install g++), if speed matters")
    elif torch.cuda.is_available() and shutil.which("nvcc") is None:
        text = f"{compiler}, but no nvcc: torch.compile works, DeepSpeed cannot build ops for the GPU"
        yield note("compiler", text, "install the CUDA toolkit of torch's version, if you need these ops")
    else:
        yield ok("compiler", f"{compiler}{' and nvcc' if shutil.which('nvcc') else ''}")


def _disks() -> Iterator[Finding]:
    here = Path.cwd()
    try:
        check_writable(here, "the working directory")
    except Exception as error:
        yield problem("disk", str(error), "work in a directory in which you may write")
    else:
        free = shutil.disk_usage(here).free
        text = f"{here}: {free / _GB:.1f} GB are free"
        if free < _LITTLE_DISK:
            yield note("disk", text, "free some space: a checkpoint takes 12 to 16 bytes a parameter")
        else:
            yield ok("disk", text)
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        text = f"{usage.free / _GB:.1f} of {usage.total / _GB:.1f} GB are free"
        if usage.free < _LITTLE_SHARED:
            remedy = "loader processes and NCCL need it; in a container: docker run --shm-size=8g, or --ipc=host"
            yield problem("/dev/shm", text, f"{remedy}; or set data.num_workers: 0")
        else:
            yield ok("/dev/shm", text)


def _output(*command: str) -> str:
    """Returns the first line that a command prints; empty if there is no such command, or it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.split("\n")
        return found[0].strip()
    return ""
