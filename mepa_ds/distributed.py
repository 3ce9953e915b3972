"""Process groups without DeepSpeed: who am I, start, agree, stop.

Works from torchrun's variables, the `deepspeed` launcher's, srun's, or none at all (one process).
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.machine import keep_freed_memory
from mepa_ds.safety import between_ranks

FactT = TypeVar("FactT")
_ASK_SECONDS = 1.0
ACCELERATOR = "MEPA_ACCELERATOR"
"""The environment's word on what ranks compute with: cuda or cpu (a cluster's profile sets it)."""


class SetupError(UserError):
    """The environment of this node is wrong, which this rank alone may know; starting again would not help."""


class Ranks(NamedTuple):
    """One rank of several, among which samples are divided."""

    rank: int = 0
    world_size: int = 1


ALONE = Ranks()


@dataclass(frozen=True)
class Launch:
    """This process's place among the ranks, as the launcher's environment gives it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None = None
    """The ranks on this node; None where the launcher does not tell. srun is not asked: it may show each rank one GPU
    of its own."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_launch() -> Launch:
    """Reads torchrun's or the `deepspeed` launcher's variables, else srun's, else one process.

    srun is believed only inside a step of several tasks with MASTER_ADDR set by the batch script: a shell inside
    an allocation has SLURM_NTASKS too and must stay one process.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        here = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE"))  # torchrun's, the `deepspeed` launcher's
        local_world_size = None if here is None else int(here)
        return Launch(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")), local_world_size)
    if "SLURM_PROCID" in env and "MASTER_ADDR" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Launch(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
    return Launch(0, 1, 0)


def spans_nodes() -> bool:
    """Returns whether the ranks are on several nodes, as far as the launcher tells."""
    launch = read_launch()
    if launch.local_world_size is not None:
        return launch.local_world_size < launch.world_size
    return launch.world_size > 1 and int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1


def device_of(launch: Launch) -> torch.device:
    """This rank's GPU, or the CPU if there is none, or if this machine alone runs more ranks than it has GPUs.

    MEPA_ACCELERATOR=cpu or cuda decides instead. All ranks of a job get the same kind.
    """
    if not (gpus := _gpus()) or _accelerator() == "cpu" or (_are_few(gpus, launch) and not _must_use_gpus(launch)):
        return torch.device("cpu")
    return torch.device("cuda", launch.local_rank % gpus)


def uses_gpu() -> bool:
    """Returns whether this process computes on a GPU. To be asked instead of `torch.cuda.is_available`."""
    return device_of(read_launch()).type == "cuda"


def choose_device(launch: Launch) -> torch.device:
    """Returns `device_of`, and says so where GPUs are left idle because they are too few.

    Raises:
        SetupError: there are fewer GPUs than ranks in a job that asked for GPUs (MEPA_ACCELERATOR=cuda), or on one of
            several nodes, where other ranks may find enough of them.
    """
    gpus = _gpus()
    if _are_few(gpus, launch) and _must_use_gpus(launch) and (gpus or _accelerator() == "cuda"):
        raise SetupError(
            f"node {socket.gethostname()}: {gpus} GPUs for {launch.local_world_size or 1} ranks; start as many ranks "
            f"as a node has GPUs, or set {ACCELERATOR}=cpu on all nodes"
        )
    device = device_of(launch)
    if gpus and device.type == "cpu" and launch.is_main and _accelerator() != "cpu":
        few = f"{gpus} GPU{'s' if gpus > 1 else ''}"
        log.note(f"{launch.local_world_size} ranks, but {few} on this machine: all ranks compute on the CPU, with gloo")
    hide_unused_gpus(launch)
    return device


def hide_unused_gpus(launch: Launch) -> None:
    """Where this process uses no GPU that is there, hides them from its libraries: some would start CUDA on one.

    It takes effect only until CUDA has been started, so no code may ask `torch.cuda.is_available` before.
    """
    if device_of(launch).type == "cpu" and _gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _gpus() -> int:
    return torch.cuda.device_count()  # asks the driver's library, and does not start CUDA


def _accelerator() -> str | None:
    wanted = os.environ.get(ACCELERATOR) or None
    if wanted not in (None, "cpu", "cuda"):
        raise SetupError(f"{ACCELERATOR}={wanted}: expected cpu or cuda")
    return wanted


def _are_few(gpus: int, launch: Launch) -> bool:
    return gpus < (launch.local_world_size or 1)


def _must_use_gpus(launch: Launch) -> bool:
    """Whether the CPU is no choice: the job asks for GPUs, or other nodes would not know of the choice."""
    nodes_differ = launch.local_world_size is not None and launch.local_world_size < launch.world_size
    return _accelerator() == "cuda" or (nodes_differ and _accelerator() is None)


def start(launch: Launch, timeout: timedelta = timedelta(minutes=10)) -> torch.device:
    """Creates the default process group: NCCL with GPUs, else gloo. A single process needs no port."""
    device = choose_device(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if not dist.is_initialized():
        store = dist.HashStore() if launch.world_size == 1 else None
        backend = "nccl" if device.type == "cuda" else "gloo"
        _check_interfaces(backend)
        dist.init_process_group(
            backend,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            store=store,
            device_id=device if device.type == "cuda" else None,  # NCCL connects now and splits groups off this one
        )
    return device


def _check_interfaces(backend: str) -> None:
    """Raises SetupError where the environment names a network interface that this node does not have."""
    here = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME"] if backend == "nccl" else [])):
        text = os.environ.get(variable, "")
        # NCCL's are beginnings of names, but for =NAME; ^NAME leaves one out.
        is_prefix = variable.startswith("NCCL") and not text.startswith("=")
        names = [] if text.startswith("^") else [name for name in text.lstrip("=").split(",") if name]
        missing = [n for n in names if n not in here and not (is_prefix and any(name.startswith(n) for name in here))]
        if missing and (backend == "gloo" or len(missing) == len(names)):
            raise SetupError(
                f"{variable}={text}: node {socket.gethostname()} has no network interface {missing[0]} (it has "
                f"{', '.join(here)}); mend or unset the variable, or MEPA_INTERFACE of the cluster's profile"
            )


def stop() -> None:
    """Destroys the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@cache
def note_once(text: str) -> None:
    """Says a line on stderr, on the main rank alone and once in its life: a run opens the same file several times."""
    if is_main():
        log.note(text)


def is_main() -> bool:
    return rank() == 0


def ranks() -> Ranks:
    """This process's place among the ranks."""
    return Ranks(rank(), world_size())


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in its own type; with one rank, the tensor itself. Collective."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks; with one rank, the tensor itself. Collective."""
    return sum_over_ranks(value) / world_size() if world_size() > 1 else value


def sums_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The fp32 sum of each tensor over all ranks, all in one all-reduce and without gradient. Collective."""
    flat = sum_over_ranks(torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def agree(error: UserError | None) -> None:
    """Raises on every rank if any rank has an error, with the first such rank's message. Collective.

    A check that can fail on one rank alone (a path that one node does not see) ends in this call, so that no
    rank waits for ever for another that has left.
    """
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    messages = of_all(None if error is None else str(error))
    for source, message in enumerate(messages):
        if message is not None:
            everywhere = all(other == message for other in messages)
            raise UserError(message if everywhere else f"rank {source}: {message}", agreed=True)


def of_main(mine: FactT) -> FactT:
    """The main rank's value, on every rank: other nodes may see a shared file system later. Collective.

    It is made of texts, numbers, booleans, None, lists, and dictionaries with texts as keys.
    """
    return between_ranks.broadcast(mine) if world_size() > 1 else mine


def wait_for_main(work: Callable[[], FactT], on_wait: Callable[[], object]) -> FactT | None:
    """What `work` returns on the main rank, which alone does it; None on the others. Collective.

    The ranks ask each other every second whether it is done: a single collective, which the others would enter at
    once, has a time-out. `on_wait` is called as often, and must not raise.

    Raises:
        UserError: on every rank, when `work` raises one.
    """
    done = threading.Event()
    found: list[FactT] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:  # raised again below, by the thread that waits
            errors.append(error)
        finally:
            done.set()

    if is_main():
        threading.Thread(target=run, daemon=True, name="main-rank-work").start()
    while not of_main(is_main() and done.wait(_ASK_SECONDS)):
        on_wait()
    error = errors[0] if errors else None
    if error is not None and not isinstance(error, UserError):
        raise error
    agree(error)
    return found[0] if found else None


def of_all(mine: FactT) -> list[FactT]:
    """The value of every rank, by rank; of the same types as for `of_main`. Collective."""
    return between_ranks.all_gather(mine) if world_size() > 1 else [mine]


def tensors_of_all(mine: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The CPU tensors of every rank, by rank and name. Collective."""
    return between_ranks.all_gather_tensors(mine) if world_size() > 1 else [dict(mine)]
