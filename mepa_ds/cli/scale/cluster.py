"""`mepa scale cluster`: a recipe on clusters of many sizes, simulated."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from mepa_ds import log, shipped
from mepa_ds.command_line.tables import aligned
from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.files import check_writable
from mepa_ds.planning.cluster.files import checkpoint_files, loader_files, resume_files, shard_sizes
from mepa_ds.planning.cluster.machines import DEVICES, STORAGE_BANDWIDTH, STORAGE_TOTAL, Assumptions, Cluster
from mepa_ds.planning.cluster.search import Found, Simulated, ep_sizes, search
from mepa_ds.planning.cluster.work import Workload
from mepa_ds.slurm.profile import Profile, read_profile


@dataclass
class ClusterOptions:
    """For each number of GPUs: the fastest way to spread the recipe's global batch over them (ep_size, micro-batch,
    accumulation, overlapped reduction) that fits in memory, the time of its step by part, images a second, MFU, memory;
    and what loader and checkpoints ask of the file system. A simulation: docs/cluster_simulation.md has its formulas,
    its assumptions and its error where it could be measured."""

    recipe: tyro.conf.Positional[Path]
    """Recipe file; those of recipes/ are found from any directory."""
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """key=value, such as model.preset=mepa-d20."""
    gpus: str = "8..1024"
    """Numbers of GPUs: 8..1024 doubles from 8 on; 8,24,96 are these."""
    profile: str = "h100"
    """Profile of the cluster: a name of slurm/clusters, or a file that ends in .env."""
    global_batch: int | None = None
    """Images a step [default: the recipe's]."""
    assume: Assumptions = field(default_factory=Assumptions)
    """What the simulation assumes"""
    json: Path | None = None
    """File for all numbers."""
    figure: Path | None = None
    """Picture of a step's parts against the number of GPUs."""


def main(argv: list[str]) -> None:
    options = tyro.cli(ClusterOptions, prog="mepa scale cluster", args=argv)
    world_sizes = numbers_of(options.gpus)
    options.assume.check()
    config = load_config(PretrainConfig, shipped.find(options.recipe), options.overrides)
    profile = read_profile(options.profile)
    cluster = cluster_of(profile)
    batch = config.train.global_batch if options.global_batch is None else options.global_batch
    if batch < 1:
        raise UserError(f"--global-batch {batch}: expected at least 1")
    if config.parallel.precision == "fp32":
        raise UserError("parallel.precision: fp32 is not simulated, only bf16 and fp16; add parallel.precision=bf16")
    for path, option in ((options.json, "--json"), (options.figure, "--figure")):
        if path is not None:
            check_writable(path.parent, option)
    most = max(batch // min(world_sizes), 1)
    sizes = ep_sizes(config.model.moe.num_experts if config.model.moe else 1, world_sizes)
    workload = Workload(config, sizes, (min(2, most), min(32, most)))
    found = search(workload, world_sizes, batch, cluster, options.assume)
    if options.json is not None:
        facts = report(found, workload, cluster, options.assume, batch)
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    if options.figure is not None:
        from mepa_ds.planning.cluster.figure import draw

        draw([entry.best for entry in found if entry.best is not None], options.figure)
    log.say(format_found(found, workload, cluster, options.assume, batch))


def numbers_of(text: str) -> list[int]:
    """Returns the numbers of `8..1024` (doubled from the first on) or `8,16,24`. Raises UserError for other texts."""
    if ends := re.fullmatch(r"([1-9][0-9]*)\.\.([1-9][0-9]*)", text):
        first, last = int(ends[1]), int(ends[2])
        numbers = [first << doubled for doubled in range(last.bit_length()) if first << doubled <= last]
    else:
        numbers = [int(word) for word in text.split(",") if re.fullmatch("[1-9][0-9]*", word)]
    if not numbers or (".." not in text and len(numbers) != text.count(",") + 1):
        raise UserError(f"--gpus {text}: expected a range such as 8..1024, or numbers such as 8,16,24")
    return numbers


def cluster_of(profile: Profile) -> Cluster:
    """Returns the cluster of a profile: its GPUs by MEPA_GPU_TYPE, its links where it gives them.

    Raises UserError for a kind of GPU that is not known.
    """
    kind = profile.get("GPU_TYPE").lower()
    device = next((rates for name, rates in DEVICES.items() if name in kind), None)
    if device is None:
        raise UserError(
            f"{profile.path}: MEPA_GPU_TYPE={profile.get('GPU_TYPE')}: the simulation knows {', '.join(DEVICES)}; copy "
            "the profile, name the nearest of these there, and give the copy with --profile"
        )
    memory = profile.number("GPU_MEMORY_GB", 1) * 1e9 if profile.get("GPU_MEMORY_GB") else None
    return Cluster(
        ranks_per_node=profile.gpus_per_node,
        device_memory=memory,
        peak_flops=device.peak_flops,
        memory_bandwidth=device.memory_bandwidth,
        node_bandwidth=profile.bandwidth("NODE_BANDWIDTH") or device.node_bandwidth,
        network_bandwidth=profile.bandwidth("NETWORK_BANDWIDTH") or device.network_bandwidth,
        storage_bandwidth=profile.bandwidth("STORAGE_BANDWIDTH") or STORAGE_BANDWIDTH,
        storage_total=profile.bandwidth("STORAGE_TOTAL") or STORAGE_TOTAL,
    )


def report(
    found: Sequence[Found], workload: Workload, cluster: Cluster, assumed: Assumptions, batch: int
) -> dict[str, Any]:
    """Returns all numbers, as JSON has them."""
    return {
        "recipe": workload.config.output_dir.name,
        "global_batch": batch,
        "cluster": asdict(cluster),
        "assumptions": asdict(assumed),
        "assumed": workload.assumed,
        "gpus": [
            {
                "gpus": entry.world_size,
                "reason": entry.reason,
                "best": None if entry.best is None else entry.best.to_dict(),
                "next_best": [simulated.to_dict() for simulated in entry.layouts[1:6]],
                "files": {name: work.to_dict() for name, work in files_of(entry, workload, batch).items()},
            }
            for entry in found
        ],
    }


def files_of(entry: Found, workload: Workload, batch: int) -> dict[str, Any]:
    """Returns what loader, checkpoint and resuming ask of the file system; nothing where the batch does not divide."""
    if entry.best is None:
        return {}
    config, size = workload.config, workload.checkpoint_bytes
    sets = 1 + (config.data.features is not None)
    loader = loader_files(shard_sizes(config), sets, workload.sample_bytes, entry.world_size, batch, config.seed)
    checkpoint, resuming = checkpoint_files(entry.world_size, size), resume_files(entry.world_size, size)
    return {"loader, first epoch": loader, "checkpoint": checkpoint, "resuming": resuming}


_PART_COLUMNS = {
    "compute": ("matrix products", "other operators", "launches", "imbalance"),
    "all-to-all": ("all-to-all",),
    "gradients": ("gradients", "weights"),
    "update": ("optimizer",),
    "data": ("data",),
}


def format_found(found: Sequence[Found], workload: Workload, cluster: Cluster, assumed: Assumptions, batch: int) -> str:
    """Returns the tables as a person reads them."""
    head = ("GPUs", "ep_size", "images a rank", "accumulation", "overlap", "step", *_PART_COLUMNS)
    rows = [(*head, "images/s", "MFU", "GB a GPU")]
    rows += [_cells(entry.best) for entry in found if entry.best is not None]
    lines = [f"simulated: {batch} images a step; seconds of a step by part, of what computation does not hide"]
    lines += aligned(rows)
    lines += [f"{entry.world_size} GPUs: {entry.reason}" for entry in found if entry.reason]
    files = [("GPUs", "", "opened", "looked at", "GB", "open at once on a rank")]
    for entry in found:
        for name, work in files_of(entry, workload, batch).items():
            counts = (str(work.opened), str(work.looked_at), f"{work.bytes / 1e9:.1f}", str(work.open_at_once or ""))
            files.append((str(entry.world_size), name, *counts))
    if len(files) > 1:
        lines += ["", "asked of the file system, over all ranks:", *aligned(files, left=2)]
    lines += ["", "assumed (each is an option, --assume.NAME): " + _listed(asdict(assumed))]
    lines += ["the cluster: " + _listed(asdict(cluster))]
    return "\n".join([*lines, *(f"assumed: {line}" for line in workload.assumed)])


def _cells(best: Simulated) -> tuple[str, ...]:
    layout = best.layout
    parts = (sum(best.seconds[part] for part in parts) for parts in _PART_COLUMNS.values())
    return (
        str(layout.world_size),
        str(layout.ep_size),
        str(layout.micro_batch),
        str(layout.accumulation),
        "yes" if layout.overlap else "no",
        f"{best.step_seconds:.4f}",
        *(f"{seconds:.4f}" for seconds in parts),
        f"{best.images_per_second:.0f}",
        f"{best.mfu:.1%}",
        f"{best.memory / 1e9:.1f}",
    )


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
