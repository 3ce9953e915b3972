"""Size of the page of a long run, and the time to write it: `mepa report` on runs that are made up here.

    python benchmarks/report.py --json FILE
    python benchmarks/report.py --every 1 --layers 0          # a record a step, without experts

A made-up run has the records of an ImageNet run: ten scales, routing, spikes, restarts, and pictures of noise, which
compress worse than any photo.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from mepa_ds.command_line import entry
from mepa_ds.files import write_json

_PARTS = ("step", "data", "loader", "inputs", "forward", "backward", "optimizer", "all_to_all", "own")


@dataclass(frozen=True)
class Options:
    """Write the pages of made-up runs, and measure."""

    json: Path | None = None
    """Write the numbers here."""
    steps: int = 100_000
    """Steps of each run."""
    every: int = 20
    """Steps of a record."""
    scales: int = 10
    """Token maps of an image."""
    layers: int = 12
    """Layers with experts; 0 for a dense model."""
    experts: int = 16
    """Experts of a layer."""
    pictures: int = 50
    """Pictures of samples, of 8 x 8 images."""
    side: int = 256
    """Pixels of an image."""
    runs: int = 1
    """Runs on the page."""
    keep: Path | None = None
    """Keep runs and page in this directory."""


def made_up_run(directory: Path, options: Options, seed: int = 0) -> None:
    """Writes metrics.jsonl, resolved.yaml, status.json and samples/ of a run."""
    draw = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "metrics.jsonl", "w") as file:
        for record in _records(options, draw):
            file.write(json.dumps(record) + "\n")
    recipe = (
        f"seed: {seed}\ntokenizer: weights/tokenizer\ndata:\n  heldout_tokens: data/val.tokens\n"
        f"train:\n  steps: {options.steps}\n"
    )
    (directory / "resolved.yaml").write_text(recipe)
    write_json(directory / "status.json", {"state": "finished", "step": options.steps, "num_steps": options.steps})
    (directory / "samples").mkdir(exist_ok=True)
    for number in range(1, options.pictures + 1):
        coarse = draw.integers(0, 256, (8 * options.side // 8, 8 * options.side // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((8 * options.side, 8 * options.side), Image.Resampling.BICUBIC)
        step = options.steps * number // options.pictures
        picture.save(directory / "samples" / f"step_{step:08d}.png", compress_level=1)


def _records(options: Options, draw: np.random.Generator) -> Any:
    every, scales = options.every, options.scales
    restarts = {options.steps // 4 // every * every, options.steps // 2 // every * every}
    start = {"world_size": 8, "device": "NVIDIA H100", "ep_size": 1, "zero_stage": 2, "precision": "bf16",
             "total_parameters": 1_200_000_000, "active_parameters": 400_000_000, "projector_parameters": 9_000_000,
             "step_flops": 1.5e15, "num_steps": options.steps, "num_samples": 1_281_167}  # fmt: skip
    yield {"event": "start", "step": 0, **start}
    for step in range(every, options.steps + 1, every):
        yield _train(step, options, draw)
        if options.layers:
            yield {"event": "routing", "step": step, "layers": _layers(options, draw), "collapsed_experts": 0}
        if step % (options.steps // 100) < every:
            ce = 7.5 + 2 * (step + 500) ** -0.2 + draw.normal(0, 0.002)
            parts = {"ce_scale": [ce] * scales, "accuracy_scale": [0.05] * scales}
            yield {"event": "heldout", "step": step, "best": True, "ce": ce, "ce_last": ce, "accuracy": 0.05, **parts,
                   "accuracy_last": 0.05, "seconds": 11.0}  # fmt: skip
        if step in restarts:
            yield {"event": "start", "step": step, **start}
            yield {"event": "recipe_changed", "step": step, "changes": {"optim.clip": [2.0, 1.0]}}
        if draw.random() < 0.01:
            line = f"the loss of {9 + draw.random():.4f} is far above the recent ones"
            yield {"event": "loss_spike", "step": step, "loss": 9.0, "message": line}


def _train(step: int, options: Options, draw: np.random.Generator) -> dict[str, Any]:
    ce = 7.4 + 2 * (step + 500) ** -0.2 + draw.normal(0, 0.01)
    seconds = dict(zip(_PARTS, (draw.gamma(50, 0.01, len(_PARTS))).tolist(), strict=True))
    ranks = {f"{part}_seconds": {"min": value, "max": 1.1 * value, "max_rank": 3} for part, value in seconds.items()}
    noise = draw.normal(0, 0.02, (2, options.scales))
    return {
        "event": "train", "step": step, "epoch": step * 768 / 1_281_167, "images": step * 768, "skipped_steps": 0,
        "replaced_samples": 0, "lr": 2e-4 * (1 - step / options.steps), "scales": options.scales, "applied": True,
        "steps": options.every, "loss": ce + 0.3, "ce": ce, "alignment": 0.4 + draw.normal(0, 0.01),
        "balance": 1.01, "ce_last": ce, "ce_scale": (ce + noise[0]).tolist(), "accuracy": 0.05, "accuracy_last": 0.05,
        "accuracy_scale": (0.05 + noise[1] / 10).tolist(), "grad_norm": float(draw.gamma(20, 0.05)), "step_loss": ce,
        **{f"{part}_seconds": value for part, value in seconds.items()}, "mean_step_seconds": seconds["step"],
        "images_per_second": 768 / seconds["step"], "tokens_per_second": 1e6, "flops_per_second": 3e15,
        "peak_memory_bytes": 60 * 2**30, "ranks": {**ranks, "peak_memory_bytes": {"min": 1, "max": 2, "max_rank": 0}},
        "mfu": 0.4 + draw.normal(0, 0.01),
    }  # fmt: skip


def _layers(options: Options, draw: np.random.Generator) -> dict[str, Any]:
    layers = {}
    for layer in range(options.layers):
        load_SE = draw.dirichlet(np.full(options.experts, 20.0), options.scales).round(5)
        by_scale = draw.random(options.scales).round(5).tolist()
        layers[str(layer)] = {
            "load": load_SE.mean(0).round(5).tolist(), "load_scale": load_SE.tolist(),
            "probability_scale": load_SE.tolist(), "entropy_scale": by_scale, "load_variance_scale": by_scale,
            "dropped_scale": by_scale,
        }  # fmt: skip
    return layers


def measure(options: Options, folder: Path) -> dict[str, Any]:
    runs = [folder / f"run{number}" for number in range(options.runs)]
    for number, run in enumerate(runs):
        made_up_run(run, options, number)
    log_bytes = sum((run / "metrics.jsonl").stat().st_size for run in runs)
    page, seconds, cpu_seconds = folder / "report.html", [], []
    command = [sys.executable, "-m", "mepa_ds", "report", *map(str, runs), "--out", str(page)]
    for _ in range(2):  # the first may put the charts' library together
        began, used = time.perf_counter(), _cpu_seconds()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(round(time.perf_counter() - began, 2))
        cpu_seconds.append(round(_cpu_seconds() - used, 2))
    sizes = {"page_bytes": page.stat().st_size, "log_bytes": log_bytes}
    return {**sizes, "seconds": seconds, "cpu_seconds": cpu_seconds, "of": asdict(options)}


def _cpu_seconds() -> float:
    """Of all processes that have ended: what they took, whoever else wanted the machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    options = tyro.cli(Options)
    folder = options.keep or Path(tempfile.mkdtemp())
    try:
        found = measure(options, folder)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"log   {found['log_bytes'] / 2**20:8.1f} MiB\npage  {found['page_bytes'] / 1e6:8.2f} MB")
    for name, of in (("seconds", "time"), ("cpu_seconds", "CPU")):
        print(f"{of:<5} {found[name][0]:8.2f} s, again {found[name][1]:.2f} s")
    if options.json is not None:
        write_json(options.json, {**found, "of": {key: str(value) for key, value in found["of"].items()}})


if __name__ == "__main__":
    entry.run(main)
