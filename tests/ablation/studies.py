"""Ablations for tests: a tiny one, and runs that were never trained, with records that follow a rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mepa_ds.ablation.config import AblationConfig
from mepa_ds.ablation.plan import planned
from mepa_ds.config.base import validate
from tests.scaling.study.studies import base_recipe

MOE = {"num_experts": 4, "top_k": 2, "expert_ratio": 4 / 3}


def ablation_values(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "base": str(base_recipe(folder, **changes.pop("base", {}))),
        "output_dir": str(folder / "ablation"),
        "baseline": "dense",
        "flops_tolerance": 0.06,  # widths of experts are rounded to multiples of 8
        "arms": {
            "dense": {"title": "dense"},
            "smoe": {"title": "SMoE", "set": {"model.moe": MOE | {"router": "smoe"}}},
            "stmoe": {"title": "STMoE", "set": {"model.moe": MOE}},
        },
        "compare": [["stmoe", "smoe"]],
    } | changes


def ablation_of(folder: Path, **changes: Any) -> AblationConfig:
    return validate(AblationConfig, ablation_values(folder, **changes), "ablation.yaml")


def ablation_file(folder: Path, **changes: Any) -> Path:
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(ablation_values(folder, **changes)))
    return path


def pretend(ablation: AblationConfig, effects: dict[str, float], noise: float = 0.01) -> None:
    """Makes runs finished without training: the loss is 3 + the arm's effect + the seed's + a little."""
    plan = planned(ablation)
    plan.write_if_needed()
    for number, row in enumerate(plan.rows()):
        folder = Path(row["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "resolved.yaml").write_text(Path(row["recipe"]).read_text())
        (folder / "status.json").write_text(json.dumps({"state": "finished", "step": row["steps"]}))
        ce = 3 + effects.get(row["arm"], 0.0) + 0.1 * row["seed"] + noise * ((number * 7) % 5 - 2)
        end = {"step": row["steps"]}
        records: list[dict[str, Any]] = [
            {"event": "train", **end, "mean_step_seconds": 0.5},
            {"event": "heldout", **end, "ce": ce, "ce_last": ce + 1, "accuracy": 0.1, "ce_scale": [ce - 1, ce, ce + 1]},
            {"event": "score", **end, "patch-pca.fd": 10 * ce, "patch-pca.fd_low": 9 * ce,
             "class_agreement": 1 / ce, "seconds": 1.0, "protocol": {"images": 9}},
        ]  # fmt: skip
        if row["arm"] != "dense":
            layer = {"load_variance_scale": [4.0, 2.0, 0.0], "entropy_scale": [1.0, 1.0, 1.0]}
            records.append({"event": "routing", **end, "layers": {"0": layer, "1": layer}})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
