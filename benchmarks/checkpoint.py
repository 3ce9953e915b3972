"""What a checkpoint costs training: blocks of steps with none, one in the background, and one that is waited for.

    python benchmarks/checkpoint.py --json checkpoint.json

Blocks of the three kinds take turns, so that a busy machine disturbs all alike; medians are compared. A block ends when
its checkpoint is on disk, and says if that takes longer than its steps: nothing of the cost is left out. One process,
on the GPU if there is one; tokens are random, everything else is the training step and the checkpoint of a real run.
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from mepa_ds import distributed
from mepa_ds.checkpoint.background_writer import Written
from mepa_ds.checkpoint.files import find_damage, list_checkpoints
from mepa_ds.checkpoint.state import RunState
from mepa_ds.config.base import validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.objective.objective import ModelInputs
from mepa_ds.pretrain.checkpointing import Kept, RunCheckpoints

KINDS = ("none", "background", "waited for")


@dataclass
class Options:
    """Size of the model and length of the measurement."""

    depth: int = 4
    """Blocks; the width is 64 times as much."""
    batch: int = 16
    """Images a step."""
    steps: int = 20
    """Steps a block, with at most one checkpoint."""
    rounds: int = 5
    """Blocks of each kind."""
    json: Path | None = None
    """Where the numbers go as well."""


def main(options: Options) -> None:
    device = distributed.start(distributed.read_launch())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the directory goes then too
    with tempfile.TemporaryDirectory(prefix="checkpoint_benchmark_", ignore_cleanup_errors=True) as directory:
        report = measure(options, device, Path(directory))
    distributed.stop()
    print(json.dumps(report, indent=2))
    print(f"a checkpoint every {options.steps} steps costs {report['background_overhead_percent']:.2f} % of the time")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(options: Options, device: torch.device, directory: Path) -> dict[str, object]:
    config = make_config(options, device)
    engine = PretrainEngine(config, None, device)
    checkpoints = RunCheckpoints(engine, directory, Kept(1))
    inputs = make_inputs(config, options.batch, device)
    state = RunState(recipe=json.loads(config.model_dump_json()))
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    run_block(engine, checkpoints, inputs, state, 3, "waited for")  # memory is allocated, kernels are warm
    written: list[Written] = []
    with tqdm(total=options.rounds * len(KINDS), desc="blocks", disable=None) as bar:
        for _ in range(options.rounds):
            for kind in KINDS:
                took, of_block = run_block(engine, checkpoints, inputs, state, options.steps, kind)
                seconds[kind].append(took)
                written += of_block
                bar.update()
    if failed := [item.error for item in written if item.error is not None]:
        raise SystemExit(f"error: a checkpoint could not be written: {failed[0]}")
    longest, shortest = max(item.write_seconds for item in written), min(seconds["none"])
    if longest > shortest:
        print(
            f"a write took {longest:.2f} s, longer than {options.steps} steps ({shortest:.2f} s): these blocks measure "
            "waiting for the disk; give more --steps",
            file=sys.stderr,
        )
    (last,) = list_checkpoints(checkpoints.directory)
    assert find_damage(last) is None
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in engine.objective.parameters()),
        "checkpoint_bytes": sum(path.stat().st_size for path in last.iterdir()),
        "device": str(device),
        "steps_a_checkpoint": options.steps,
        "step_seconds": median["none"] / options.steps,
        "stalled_seconds": statistics.median(item.stalled_seconds for item in written),
        "waits_for_disk": longest > shortest,
        "write_seconds": statistics.median(item.write_seconds for item in written),
        "background_overhead_percent": 100 * (median["background"] / median["none"] - 1),
        "waited_for_overhead_percent": 100 * (median["waited for"] / median["none"] - 1),
        "block_seconds": seconds,
    }


def run_block(
    engine: PretrainEngine, checkpoints: RunCheckpoints, inputs: ModelInputs, state: RunState, steps: int, kind: str
) -> tuple[float, list[Written]]:
    """Seconds of `steps` steps until the checkpoint, taken after the first, is on disk; and what was written."""
    started = time.perf_counter()
    written: list[Written] = []
    for step in range(steps):
        engine.begin_step()
        engine.backward(engine.forward(inputs))
        engine.update(lr=1e-4)
        state.step += 1
        if step == 0 and kind != "none":
            checkpoints.save(state)
            if kind == "waited for":
                written += checkpoints.settle()
    written += checkpoints.settle()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, written


def make_config(options: Options, device: torch.device) -> PretrainConfig:
    values = {
        "output_dir": "unused",
        "tokenizer": "unused",
        "data": {"tokens": "unused"},
        "model": {"preset": f"mepa-d{options.depth}", "scales": [1, 2, 3, 4, 6], "codebook_size": 1024},
        "objective": {"alignment": None},
        "train": {"global_batch": options.batch, "steps": 1},
        "parallel": {"precision": "bf16" if device.type == "cuda" else "fp32"},
    }
    return validate(PretrainConfig, values, "benchmark")


def make_inputs(config: PretrainConfig, batch: int, device: torch.device) -> ModelInputs:
    model, schedule = config.model, config.model.schedule
    later = schedule.num_tokens - schedule.lengths[0]
    return ModelInputs(
        labels_B=torch.randint(model.num_classes, (batch,), device=device),
        inputs_BLZ=torch.randn(batch, later, model.code_width, device=device),
        tokens_BL=torch.randint(model.codebook_size, (batch, schedule.num_tokens), device=device),
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
