"""Small runs for tests of reports: metrics.jsonl, resolved.yaml, status.json and pictures, written in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SCALES, LAYERS, EXPERTS = 3, 2, 4


def train(step: int, draw: np.random.Generator, **others: Any) -> dict[str, Any]:
    ce = 4 * (step + 5) ** -0.3 + draw.normal(0, 0.02)
    seconds = dict.fromkeys(("step", "data", "loader", "inputs", "forward", "backward", "optimizer", "own"), 0.1)
    return {
        "event": "train", "step": step, "epoch": step / 100, "images": 8 * step, "skipped_steps": 0, "lr": 1e-3,
        "replaced_samples": 0, "scales": SCALES, "applied": True, "steps": 10, "loss": ce + 0.1, "ce": ce,
        "alignment": -0.5, "balance": 1.0, "ce_last": ce, "ce_scale": [ce + i for i in range(SCALES)],
        "accuracy": 0.2, "accuracy_last": 0.2, "accuracy_scale": [0.2] * SCALES, "grad_norm": 1 + draw.random(),
        **{f"{part}_seconds": value for part, value in seconds.items()}, "mean_step_seconds": 0.5,
        "images_per_second": 16 + draw.normal(0, 0.1), "flops_per_second": 2e9, "peak_memory_bytes": 2**30,
        "ranks": {"own_seconds": {"min": 0.1, "max": 0.2, "max_rank": 1}}, **others,
    }  # fmt: skip


def routing(step: int, draw: np.random.Generator) -> dict[str, Any]:
    layers = {}
    for layer in range(LAYERS):
        load_SE = draw.dirichlet(np.full(EXPERTS, 5.0), SCALES)
        numbers = [0.5] * SCALES
        layers[str(layer)] = {
            "load": load_SE.mean(0).tolist(), "load_scale": load_SE.tolist(), "probability_scale": load_SE.tolist(),
            "entropy_scale": numbers, "load_variance_scale": numbers, "dropped_scale": [0.0] * SCALES,
        }  # fmt: skip
    return {"event": "routing", "step": step, "layers": layers, "collapsed_experts": 0}


def records_of_a_run(records: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Of a run with two starts, every kind of event, and a record each 10 steps."""
    draw, last = np.random.default_rng(seed), 10 * records
    start = {"event": "start", "world_size": 2, "device": "a CPU", "precision": "fp32", "ep_size": 1, "zero_stage": 2,
             "num_steps": last, "num_samples": 800, "total_parameters": 2_000_000, "active_parameters": 1_000_000,
             "projector_parameters": 0, "step_flops": 1e9, "versions": {"mepa_ds": "0.2", "torch": "2.10"}}  # fmt: skip
    found = [{**start, "step": 0}]
    half = last // 20 * 10
    for step in range(10, last + 1, 10):
        found += [train(step, draw), routing(step, draw)]
        if step % 100 == 0:
            scores = {"ce": 2.0, "ce_last": 2.0, "ce_scale": [2.0] * SCALES, "accuracy": 0.3, "accuracy_last": 0.3}
            found.append({"event": "heldout", "step": step, "best": True, **scores, "seconds": 1.5})
            interval = {"fid": 30.0, "fid_error": 1.0, "fid_low": 28.0, "fid_high": 32.0}
            found.append(
                {"event": "score", "step": step, "num_samples": 50, **interval, "protocol": {}, "seconds": 2.0}
            )
            found.append({"event": "samples", "step": step, "path": f"samples/step_{step:08d}.png", "classes": [0, 1]})
            found.append({"event": "written", "step": step, "what": "checkpoint", "stalled_seconds": 0.1})
        if step == half:
            found += [{**start, "step": step, "world_size": 4}]
            found += [{"event": "recipe_changed", "step": step, "changes": {"optim.base_lr": [1e-3, 5e-4]}}]
            for kind in ("skipped_step", "rollback", "loss_spike", "slow_rank"):
                found.append({"event": kind, "step": step, "message": f"said by {kind} <b>&"})
            found.append({"event": "damaged_sample", "step": step, "count": 2, "damage": ["a: cut short", "b: empty"]})
    return found


def tokenizer_records(records: int = 30) -> list[dict[str, Any]]:
    draw, found = np.random.default_rng(0), list[dict[str, Any]]()
    for step in range(10, 10 * records + 1, 10):
        loss = float(1 / step + draw.random() / 100)
        found.append({
            "event": "train", "step": step, "samples": 8 * step, "loss": loss, "reconstruction": loss, "grad_norm": 1.0,
            "codebook_use": 0.9, "codebook_use_by_scale": [0.5] * SCALES, "perplexity": 30.0, "revived_codes": 1,
            "lr": 1e-3, "images_per_second": 20.0,
        })  # fmt: skip
        if step % 100 == 0:
            found.append({"event": "heldout", "step": step, "samples": 8 * step, "psnr": 20.0, "ssim": 0.8,
                          "codebook_use": 0.9, "codebook_use_by_scale": [0.5] * SCALES, "perplexity": 31.0,
                          "num_images": 50})  # fmt: skip
    return found


def write_run(
    directory: Path, records: Iterable[dict[str, Any]], recipe: str = "seed: 0\n", pictures: Iterable[int] = ()
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "resolved.yaml").write_text(recipe)
    (directory / "status.json").write_text('{"state": "finished", "step": 600, "num_steps": 600}')
    for step in pictures:
        path = directory / "samples" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (900, 300), (step % 256, 90, 40)).save(path)
    return directory
