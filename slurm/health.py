"""One look at the allocation before work begins; every rank runs `health.py STATE [RECIPE key=value ...]`.

Checks that every rank's GPU computes, and that every node has room on its disks and the recipe's data in sight; that
all ranks find each other; and how fast they exchange data. Trouble is one line that names the node and the remedy.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mepa_ds import log
from mepa_ds.config.paths import given_path
from mepa_ds.safety.text import message
from mepa_ds.slurm.in_job.recipe_value import recipe_paths

MEETING_SECONDS = 120.0
LEAVING_SECONDS = 10.0
MEGABYTES = 16
REPEATS = 3


class LoneTroubleError(Exception):
    """What this rank alone knows, since it cannot tell the others."""


def uses_gpus() -> bool:
    return os.environ.get("MEPA_ACCELERATOR", "cuda") == "cuda"


def gpu_trouble() -> str | None:
    """What is wrong with this rank's GPU; makes it the current one."""
    ranks, mine = int(os.environ["RANKS_PER_NODE"]), int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() < ranks:
        return f"{torch.cuda.device_count()} GPUs visible, but {ranks} ranks start there; is a GPU or its driver down?"
    try:
        torch.cuda.set_device(mine)
        ones = torch.ones(256, 256, device="cuda")
        if (ones @ ones).sum().item() != 256**3:
            return f"GPU {mine} computes wrong sums; take the node out (MEPA_EXCLUDE)"
    except RuntimeError as error:
        return f"GPU {mine}: {_first_line(error)}; take the node out (MEPA_EXCLUDE) if it stays so"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def local_trouble(state: Path, recipe: Sequence[str]) -> str | None:
    """What is wrong with this node; None: nothing."""
    env = os.environ
    trouble = gpu_trouble() if uses_gpus() else None
    if trouble is not None:
        return trouble
    least = float(env.get("MEPA_MIN_DISK_GB", "1"))
    for folder in (state, Path(env["MEPA_SCRATCH"])):
        if not folder.is_dir():
            return f"{folder}: not visible; choose paths that every node sees (MEPA_SCRATCH, output_dir)"
        free = shutil.disk_usage(folder).free / 1e9
        if free < least:
            return f"{folder}: {free:.1f} GB free, at least {least:g} wanted (MEPA_MIN_DISK_GB)"
    if recipe:
        for key, path in recipe_paths(given_path(recipe[0], "recipe"), recipe[1:]):
            if not path.exists():
                return f"{key}: {path} is not visible; put it where all nodes see it, or mount it there"
    return None


def meet(rank: int, world_size: int, node: str, trouble: str | None) -> list[str]:
    """Exchanges every rank's node and trouble over a store on the head node; returns all lines of trouble.

    Raises LoneTroubleError where only this rank can tell.
    """
    # Beside the port that the work uses: a socket that has just been closed there would be in the way.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
    wait = timedelta(seconds=MEETING_SECONDS)
    try:
        store = dist.TCPStore(address, port, world_size, rank == 0, wait, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise LoneTroubleError(
            f"{node}: cannot reach {address}:{port} ({type(error).__name__}); check MEPA_INTERFACE and the network"
        ) from error
    try:
        return _talk(store, rank, world_size, node, trouble)
    except RuntimeError as error:  # NCCL's and the store's too
        raise LoneTroubleError(f"{node}: rank {rank}: {_first_line(error)}") from error


def _talk(store: dist.Store, rank: int, world_size: int, node: str, trouble: str | None) -> list[str]:
    store.set(f"node-{rank}", f"{node}\n{trouble or ''}")
    end = time.monotonic() + MEETING_SECONDS
    lines, absent = [], set(range(world_size))
    while absent and time.monotonic() < end:
        for other in sorted(absent):
            if store.check([f"node-{other}"]):
                name, _, text = store.get(f"node-{other}").decode(errors="replace").partition("\n")
                lines += [f"{name}: {text}"] if text else []
                absent.remove(other)
        time.sleep(0.05)
    for name in sorted({_node_of(other) for other in absent}):
        lines.append(f"{name}: did not answer within {MEETING_SECONDS:g} s; is it up, and its network?")
    if not lines:
        lines = bandwidth(store, rank, world_size)
    store.set(f"left-{rank}", "")
    if rank == 0:  # the store lives here: the last to leave
        end = time.monotonic() + LEAVING_SECONDS
        left = [f"left-{other}" for other in range(world_size) if other not in absent]
        while not store.check(left) and time.monotonic() < end:
            time.sleep(0.02)
    return sorted(set(lines))


def _node_of(rank: int) -> str:
    return os.environ["MEPA_NODES"].split()[rank // int(os.environ["RANKS_PER_NODE"])]


def bandwidth(store: dist.Store, rank: int, world_size: int) -> list[str]:
    """Times an all-reduce and an all-to-all; rank 0 returns those that the profile calls too slow."""
    if world_size == 1:
        return []
    device = torch.device("cuda" if uses_gpus() else "cpu")  # the current GPU is this rank's
    backend, wait = "nccl" if uses_gpus() else "gloo", timedelta(seconds=MEETING_SECONDS)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
    count = (MEGABYTES * 2**20 // 4) // world_size * world_size
    data, received = torch.ones(count, device=device), torch.empty(count, device=device)
    speeds = {
        "all-reduce": _gigabytes_a_second(lambda: dist.all_reduce(data), count, device),
        "all-to-all": _gigabytes_a_second(lambda: dist.all_to_all_single(received, data), count, device),
    }
    dist.destroy_process_group()
    if rank:
        return []
    log.say("health: " + ", ".join(f"{name} {speed:.2f} GB/s a rank" for name, speed in speeds.items()), flush=True)
    least = float(os.environ.get("MEPA_MIN_BANDWIDTH_GBS", "0"))
    return [
        f"{name} at {speed:.2f} GB/s a rank, at least {least:g} wanted (MEPA_MIN_BANDWIDTH_GBS); "
        "is the fast network in use?"
        for name, speed in speeds.items()
        if speed < least
    ]


def _gigabytes_a_second(exchange: Callable[[], object], count: int, device: torch.device) -> float:
    exchange()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        exchange()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return REPEATS * count * 4 / 1e9 / (time.perf_counter() - start)


def main() -> None:
    state, recipe = Path(sys.argv[1]), sys.argv[2:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    node = os.environ["SLURMD_NODENAME"]
    try:
        lines = meet(rank, world_size, node, local_trouble(state, recipe))
    except LoneTroubleError as trouble:
        log.say(message(f"error: health: {trouble}"), flush=True)
        sys.exit(1)
    if lines:
        if rank == 0:  # every rank knows; one tells
            log.say(message("error: health: " + "; ".join(lines)), flush=True)
        sys.exit(1)
    if rank == 0:
        log.say(f"health: {world_size} ranks on {os.environ['SLURM_JOB_NUM_NODES']} nodes are well", flush=True)


if __name__ == "__main__":
    main()
