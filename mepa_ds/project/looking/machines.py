"""What this machine can do: its cores and their speed, its GPUs and their memory."""

from __future__ import annotations

import time

import torch

from mepa_ds import distributed
from mepa_ds.machine import usable_cpus
from mepa_ds.objective.flops import peak_flops_per_second
from mepa_ds.project.looking.facts import MachineFacts

_SIDE, _SECONDS, _TRIES = 512, 0.15, 3
_SMALL_GPU = 300.0
_NO_GPU_HERE = 989.0  # of an H100, which recipes for other machines are mostly written for
_DEFAULT_GIGABYTES = 80.0


def this_machine(gpus: int | None = None, gigabytes: float | None = None) -> MachineFacts:
    """`gpus` and `gigabytes`: of another machine, for which recipes are written here. None: those that are there."""
    if gpus is None and distributed.uses_gpu():
        gpus = torch.cuda.device_count()
    if not gpus:
        return MachineFacts(cores=usable_cpus(), gflops=round(core_gflops(), 1))
    tflops = _NO_GPU_HERE
    if distributed.uses_gpu():
        gigabytes = gigabytes or torch.cuda.get_device_properties(0).total_memory / 1e9
        tflops = (peak_flops_per_second("bf16") or _SMALL_GPU * 1e12) / 1e12
    return MachineFacts(
        cores=usable_cpus(), gpus=gpus, gpu_gigabytes=round(gigabytes or _DEFAULT_GIGABYTES, 1), gpu_tflops=tflops
    )


def core_gflops() -> float:
    """1e9 operations a second of matrix products on one core, the best of a few short tries.

    By the thread's own time: what other programs take at this moment says nothing of the run.
    """
    threads = torch.get_num_threads()
    a, best = torch.ones(_SIDE, _SIDE), 0.0
    try:
        torch.set_num_threads(1)
        for _ in range(_TRIES):
            count, started = 0, time.thread_time()
            while (seconds := time.thread_time() - started) < _SECONDS:
                torch.mm(a, a)
                count += 1
            best = max(best, 2 * _SIDE**3 * count / seconds / 1e9)
    finally:
        torch.set_num_threads(threads)
    return best
