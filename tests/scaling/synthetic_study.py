"""A planned study whose runs never ran: their records are written from a law, with noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mepa_ds.config.base import dump_yaml, read_yaml
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shards.index import ShardIndex
from mepa_ds.files import write_text
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import STUDY_NAME, make_plan, read_plan, read_study, write_plan

TRUTH = {"E": 2.0, "A": 10.0, "alpha": 0.25, "B": 300.0, "beta": 0.4}
NOISE = 0.002
SECONDS = 36.0
"""Of each run."""
ROOT = Path(__file__).parents[2]
IMAGES = 12800
_STUDY: dict[str, Any] = {
    "name": "synthetic",
    "head_width": 16,
    "grids": {
        "dense": {"sizes": ["d2w48", "d3w64", "d4w96", "d4w128"], "samples": [6400, 12800, 25600, 51200]},
        "moe": {
            "sizes": ["d2w48", "d3w64", "d4w128"],
            "moe": [{"num_experts": 8, "top_k": 3, "expert_ratio": 1.0}],
            "samples": [25600],
        },
        "experts": {
            "sizes": ["d3w64"],
            "moe": [{"num_experts": count, "top_k": 3, "expert_ratio": 1.0} for count in (4, 16)],
            "samples": [25600],
        },
    },
    "seeds": {"count": 3, "at": {"sizes": ["d2w48", "d3w64"], "samples": [12800]}},
    "hold_out": {"sizes": ["d6w192"], "samples": [51200]},
    "lr": {"rule": "fixed", "peak": 2.0e-3, "sweep": {"sizes": ["d2w48", "d4w96"], "samples": [12800]}},
    "budget": {"flops_per_second": 3.0e10},
    "laws": ["chinchilla", "power"],
}


def law(matrix: float, tokens: float, experts: int = 1, distance: float = 0.0) -> float:
    """Returns the loss without noise. `distance`: of log lr from the best."""
    p = TRUTH
    size = p["A"] * matrix ** -p["alpha"] * max(experts, 1) ** -0.05
    return float(p["E"] + size + p["B"] * tokens ** -p["beta"] + 0.02 * distance**2)


def plan_study(folder: Path, **changes: Any) -> StudyConfig:
    """Writes a study, its base recipe and empty indices of its token sets into `folder`, and plans it.

    `changes` replace top-level keys of the study file; None removes one.
    """
    base = read_yaml(ROOT / "recipes" / "studies" / "toy_base.yaml")
    base["tokenizer"] = str(folder / "tokenizer")
    for key, count in (("tokens", IMAGES), ("heldout_tokens", 1000)):
        base["data"][key] = str(folder / key)
        _write_index(folder / key, count)
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    values = _STUDY | {"base": str(folder / "base.yaml"), "output_dir": str(folder / "study")} | changes
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    study = read_study(path)
    # Without the laws: the plan would simulate tables for them, which takes seconds.
    write_plan(make_plan(study.model_copy(update={"laws": ("power",)}), with_memory=False))
    write_text(study.output_dir / STUDY_NAME, dump_yaml(study))
    return study


def _write_index(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shard = {"name": "shard-000000.tar", "num_samples": count, "bytes": 1, "sha256": "", "keys_sha256": "0"}
    made_by = {"name": "tokenizer", "identity": "0123456789ab", "settings": {}}
    index = ShardIndex.model_validate_json(
        json.dumps({"kind": "tokens", "shards": [shard], "members": {}, "made_by": made_by})
    )
    (folder / "index.json").write_text(index.model_dump_json())


def write_runs(study: StudyConfig, states: Mapping[str, str] | None = None, seed: int = 0) -> None:
    """Writes what the runs would have left behind. `states`: by run, failed, diverged or planned; else finished."""
    rng = np.random.default_rng(seed)
    for row in read_plan(study):
        state = (states or {}).get(row["run"], "finished")
        noise = float(np.exp(NOISE * rng.standard_normal()))
        if state == "planned":
            continue
        directory = Path(row["output_dir"])
        directory.mkdir(parents=True)
        shutil.copy(row["recipe"], directory / "resolved.yaml")
        status = {"state": state, "step": row["steps"] if state == "finished" else 1, "error": f"it has {state}"}
        (directory / "status.json").write_text(json.dumps(status))
        if state == "finished":
            _write_records(directory, row, noise)


def _write_records(directory: Path, row: Mapping[str, Any], noise: float) -> None:
    config = PretrainConfig.model_validate_json(json.dumps(read_yaml(Path(row["recipe"]))))
    # The best rate falls with the size, from 2e-3 at a tenth of a million weights.
    distance = np.log(row["lr_peak"] / (2e-3 * (row["params_matrix"] / 1e5) ** -0.25)) if row["role"] == "lr" else 0.0
    loss = noise * law(row["params_matrix"], row["tokens"], row["num_experts"] or 1, float(distance))
    # Of scales with 1, 4, 9 and 16 tokens; their token-weighted mean is the loss.
    lengths = np.array(config.model.schedule.lengths, float)
    share = 1 + 0.1 * (np.arange(len(lengths)) - (lengths * np.arange(len(lengths))).sum() / lengths.sum())
    by_scale = (loss * share).tolist()
    steps = row["steps"]
    records = [
        {"event": "start", "step": 0, "step_flops": row["flops"] / steps, "world_size": 1, "device": "CPU"},
        {"event": "train", "step": steps, "mean_step_seconds": SECONDS / steps, "ce": loss},
        {
            "event": "heldout", "step": steps, "ce": loss, "ce_last": by_scale[-1], "ce_scale": by_scale,
            "accuracy": 0.1, "accuracy_last": 0.1, "accuracy_scale": [0.1] * len(by_scale),
        },
    ]  # fmt: skip
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
