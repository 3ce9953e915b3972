"""A complete tiny run for tests: a random tokenizer, shard sets of random tokens and features, a recipe, a launcher."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mepa_ds.config.base import apply_overrides
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.data.shards.index import MadeBy
from mepa_ds.data.shards.samples import Kind
from mepa_ds.data.shards.writer import Manifest, ShardWriter, npy_bytes, shard_name
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SCALES = (1, 2, 3)
NUM_TOKENS = 14
CODEBOOK, CODE_WIDTH, CLASSES = 16, 4, 3
FEATURE_WIDTH, FEATURE_GRID = 6, 3


def make_tokenizer(directory: Path, seed: int = 0) -> Tokenizer:
    torch.manual_seed(seed)
    config = TokenizerConfig(
        scales=SCALES,
        codebook_size=CODEBOOK,
        code_width=CODE_WIDTH,
        channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        attention=False,
    )
    tokenizer = Tokenizer(config)
    tokenizer.save_pretrained(directory)
    return tokenizer


def write_set(
    directory: Path, kind: Kind, made_by: MadeBy, samples: list[dict[str, bytes]], per_shard: int = 16
) -> None:
    numbers = range(-(-len(samples) // per_shard))
    names = tuple(shard_name(number) for number in numbers)
    classes = tuple(str(label) for label in range(CLASSES))
    manifest = Manifest(kind=kind, shard_names=names, classes=classes, made_by=made_by)
    writer = ShardWriter(directory, manifest)
    for number, name in zip(numbers, names, strict=True):
        first = number * per_shard
        part = samples[first : first + per_shard]
        writer.write_shard(name, ((f"{first + i:06d}", members) for i, members in enumerate(part)))
    writer.finish()


def make_sets(folder: Path, identity: str, count: int = 40, seed: int = 0, name: str = "train") -> None:
    """`<folder>/<name>.tokens` and `<folder>/<name>.features`, `count` samples each."""
    rng = np.random.default_rng(seed)
    tokens, features = [], []
    for _ in range(count):
        label = int(rng.integers(CLASSES))
        codes = (rng.integers(0, 5, NUM_TOKENS) + 5 * label).astype(np.uint16)
        tokens.append({"tokens.npy": npy_bytes(codes), "cls": str(label).encode()})
        map_NP = rng.normal(size=(FEATURE_GRID**2, FEATURE_WIDTH)).astype(np.float16)
        features.append({"features.npy": npy_bytes(map_NP)})
    tokenizer = MadeBy(
        name="tiny",
        identity=identity,
        settings={"scales": list(SCALES), "codebook_size": CODEBOOK, "code_width": CODE_WIDTH},
    )
    teacher = MadeBy(name="random", identity="0", settings={"codec": "fp16", "width": FEATURE_WIDTH, "grid_side": 3})
    write_set(folder / f"{name}.tokens", "tokens", tokenizer, tokens)
    write_set(folder / f"{name}.features", "features", teacher, features)


def recipe_values(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "tokenizer": str(folder / "tokenizer"),
        "data": {
            "tokens": str(folder / "train.tokens"),
            "features": str(folder / "train.features"),
            "heldout_tokens": str(folder / "heldout.tokens"),
            "num_workers": 0,
        },
        "model": {
            "depth": 2,
            "width": 32,
            "num_heads": 2,
            "num_classes": CLASSES,
            "scales": list(SCALES),
            "codebook_size": CODEBOOK,
            "code_width": CODE_WIDTH,
            "moe": {"num_experts": 4, "expert_ratio": 2.0},
        },
        "objective": {"alignment": {"scales": [2, 3], "projector_hidden": 32}},
        "optim": {"base_lr": 0.02},
        "train": {"global_batch": 8, "steps": 20},
        "parallel": {"precision": "fp32", "deepspeed": str(ROOT / "ds_configs" / "zero2.json")},
        "log": {"every": 1, "evaluate_every": 10, "evaluate_batch": 4, "checkpoint_every": 10},
    }


def make_run(folder: Path, *overrides: str) -> Path:
    """Everything a run needs under `folder`; returns the recipe's path."""
    identity = make_tokenizer(folder / "tokenizer").identity
    make_sets(folder, identity)
    make_sets(folder, identity, count=10, seed=1, name="heldout")
    return write_recipe(folder, *overrides)


def write_recipe(folder: Path, *overrides: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(apply_overrides(recipe_values(folder), overrides)))
    return path


def free_port() -> int:
    """Below those that the system gives to connections (from 32768 on): no connection takes it before a rank does."""
    while True:
        with socket.socket() as server, suppress(OSError):
            port = random.SystemRandom().randrange(15_000, 32_000)
            server.bind(("127.0.0.1", port))
            return port


def launch(
    arguments: list[str], ranks: int = 1, timeout: float = 120, script: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs pretrain.py (or another script) on gloo ranks, as a user would; output is captured."""
    command = [sys.executable]
    if ranks > 1:
        port = free_port()
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port)]
    command += [str(script or ROOT / "pretrain.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def losses(output_dir: Path) -> list[float]:
    """Training loss of every logged step."""
    return [record["loss"] for record in read_metrics(output_dir / "metrics.jsonl") if record["event"] == "train"]
