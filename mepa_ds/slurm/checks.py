"""Checks of a job before it is submitted: the partition, its nodes, the recipe, and the places of its files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Set
from pathlib import Path

from mepa_ds.config.base import Section
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.errors import UserError
from mepa_ds.slurm.profile import Profile, root
from mepa_ds.slurm.scheduler import Node, nodes_of, partitions

_DECIDES_TOKENS = {"scales", "codebook_size", "num_classes"}


def check_partition(profile: Profile, partition: str) -> None:
    """Raises UserError unless the partition exists."""
    known = partitions()
    if partition not in known:
        raise UserError(
            f"{profile.path}: there is no partition {partition!r} on this cluster; its partitions: {', '.join(known)}"
        )


def check_nodes(profile: Profile, partition: str, num_nodes: int) -> None:
    """Raises UserError unless the partition has `num_nodes` nodes of one kind with the profile's GPUs."""
    wanted, gpus = profile.get("GPU_TYPE"), profile.gpus_per_node
    nodes = nodes_of(partition)
    constraint = profile.get("CONSTRAINT")
    if re.fullmatch(r"[\w.-]+", constraint):  # combined constraints, such as a&b, are left to sbatch
        nodes = [node for node in nodes if constraint in node.features]
    nodes = [node for node in nodes if not wanted or wanted in dict(node.gpus)]
    kinds = Counter(_kinds(node) for node in nodes)
    able = [node for node in nodes if any(count >= gpus for kind, count in node.gpus if wanted in ("", kind))]
    if len(able) < num_nodes:
        found = ", ".join(f"{count} with {kind}" for kind, count in kinds.items()) or "none that fit the profile"
        raise UserError(
            f"--nodes {num_nodes}: partition {partition} has only {len(able)} nodes with {gpus} "
            f"{wanted or 'GPUs'} a node (its nodes: {found}); ask for fewer nodes, or mend MEPA_GPUS_PER_NODE, "
            f"MEPA_GPU_TYPE or MEPA_CONSTRAINT in {profile.path}"
        )
    if not wanted and len({kind for node in able for kind, _ in node.gpus}) > 1:
        raise UserError(
            f"{profile.path}: partition {partition} mixes {' and '.join(sorted({_kinds(node) for node in able}))} "
            "a node; choose one of them with MEPA_GPU_TYPE or MEPA_CONSTRAINT"
        )


def _kinds(node: Node) -> str:
    return " + ".join(f"{count} {kind or 'GPUs'}" for kind, count in node.gpus) or "no GPU"


def check_paths(profile: Profile, paths: Iterable[tuple[str, Path]]) -> None:
    """Raises UserError for the first (name, path) that is not below one of the directories that all nodes see."""
    shared = [Path(item).expanduser().resolve() for item in profile.get("SHARED_PATHS").split()]
    if not shared:
        return
    for name, path in paths:
        absolute = (root() / path).resolve()
        if not any(absolute.is_relative_to(folder) for folder in shared):
            raise UserError(
                f"{name}: {absolute} is not visible from the nodes: {profile.path} says that they see "
                f"{', '.join(map(str, shared))} (MEPA_SHARED_PATHS); move it there, or mend the profile"
            )


def check_exists(name: str, path: Path) -> None:
    if not (root() / path).exists():
        raise UserError(f"{name}: {path}: no such file or directory; make it first, or name another")


def is_there(path: Path) -> bool:
    """Whether the path is a file, or a directory that no job is still filling."""
    from mepa_ds.data.shards.writer import MANIFEST_NAME

    return (root() / path).exists() and not (root() / path / MANIFEST_NAME).exists()


def is_cached_elsewhere(path: Path) -> bool:
    """Whether the path is a remote set whose cache lies on the nodes only."""
    from mepa_ds.data.remote.remote_file import RemoteShards

    remote = RemoteShards.read(path)
    return remote is not None and "$" in remote.directory


def check_data(config: Section, unseen: Set[str], looked_at: set[str]) -> None:
    """Makes the job's own checks of its shard sets, except for sets that cannot be looked at here (keys in `unseen`).

    `looked_at` remembers what was checked already: the runs of a study share their data.

    Raises:
        UserError: a set is of another kind, or does not fit the model, its tokenizer, or another set.
    """
    from mepa_ds.data.remote.schemes import allow
    from mepa_ds.data.shard_set import ShardSet
    from mepa_ds.pretrain.data import check_subset, open_sets
    from mepa_ds.pretrain.online import open_images

    if isinstance(config, (PretrainConfig, TokenizerTrainingConfig)):
        allow(config.data.remote_schemes)
    if isinstance(config, TokenizerTrainingConfig):
        for key, path in (("data.images", config.data.images), ("data.heldout_images", config.data.heldout_images)):
            if path is not None and key not in unseen:
                ShardSet(path, key)
    elif isinstance(config, PretrainConfig):
        if config.data.images is not None and "data.images" not in unseen:
            images = open_images(config.data.images, config.model.num_classes)
            check_subset(config.data.unique_images, images, images.window)
        seen = unseen.isdisjoint(("tokenizer", "data.tokens", "data.features", "data.heldout_tokens"))
        facts = config.model_dump_json(include={"tokenizer": True, "data": True, "model": _DECIDES_TOKENS})
        if config.data.tokens is not None and seen and facts not in looked_at:
            open_sets(config)
            looked_at.add(facts)


def check_branch(config: PretrainConfig) -> None:
    """Makes the job's own check of `branch_from` (whether its steps are those of the recipe), if it trains on tokens.

    Raises UserError.
    """
    from mepa_ds.pretrain.branching import open_branch
    from mepa_ds.pretrain.data import data_identity, open_sets

    if config.data.tokens is not None:
        sets = open_sets(config)
        open_branch(config, data_identity(config, sets), sets.num_samples)


def check_plan(profile: Profile, recipe: Path, config: PretrainConfig, world_size: int) -> str:
    """The text of `pretrain.py --dry-run` for ranks of the cluster. Raises UserError if they have too little memory."""
    from mepa_ds.planning.plan import Machine, format_plan, plan_run, this_machine

    is_gpu = profile.get("ACCELERATOR", "cuda") == "cuda"
    memory = profile.number("GPU_MEMORY_GB", 1) * 1e9 if profile.get("GPU_MEMORY_GB") else None
    here = this_machine(config, world_size, memory)
    plan = plan_run(config, Machine(world_size, is_gpu, memory, here.process))
    key = "MEPA_GPU_MEMORY_GB"
    problems = list(plan.problems)
    if not problems and profile.get("MEM_PER_GPU_GB"):
        needed, has = sum(plan.host.values()) if is_gpu else plan.peak, profile.number("MEM_PER_GPU_GB", 1)
        if needed > has * 1e9:
            key = "MEPA_MEM_PER_GPU_GB"
            problems = [f"a rank needs {needed / 1e9:.1f} GB of host memory, but has {has} GB"]
    if problems:
        raise UserError(f"{recipe}: does not fit: {'; '.join(problems)} ({key} in {profile.path})")
    return format_plan(plan).replace("give --memory, the GB of one GPU", f"set MEPA_GPU_MEMORY_GB in {profile.path}")
