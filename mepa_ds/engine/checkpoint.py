"""Checkpoints that do not know the topology, and weights that need no DeepSpeed (D5).

A checkpoint is a directory `step_<number>`: DCP files with every parameter's fp32 master and Adam moments, and
`run.json` with everything else. It is written under another name and renamed when complete, so a directory with
this name is a whole checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mepa_ds import distributed
from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.engine.fragment_store import load_fragments, read_whole, save_fragments
from mepa_ds.engine.fragments import adam_step, fragments
from mepa_ds.errors import UserError
from mepa_ds.files import fsync_directory, write_json
from mepa_ds.models.transformer import KIND
from mepa_ds.weights import save_pretrained

_NAME = re.compile(r"step_(\d{8})")
TRANSFORMER = "transformer."


@dataclass
class RunState:
    """What a run is, besides tensors. All of it is independent of the number of ranks."""

    step: int
    """Optimizer steps done."""
    position: int
    """Images consumed: the position in the endless sample stream."""
    adam_step: int
    """Steps that Adam has seen (skipped ones are not among them)."""
    best_heldout_ce: float
    """Lowest held-out cross-entropy so far (inf before the first evaluation)."""
    evaluated_step: int
    """Step of the last held-out evaluation."""
    model: dict[str, object]
    """The model config's values."""


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def save_checkpoint(engine: PretrainEngine, state: RunState, directory: Path, keep: int) -> Path:
    """Writes `directory/step_<step>` and deletes all but the newest `keep`. Collective."""
    target = directory / f"step_{state.step:08d}"
    temporary = directory / f".{target.name}.tmp"
    if distributed.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    save_fragments(fragments(engine.objective, engine.zero), temporary)
    if distributed.is_main():
        state.adam_step = adam_step(engine.zero)
        write_json(temporary / "run.json", asdict(state))
        _publish(temporary, target)
        for old in list_checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def load_checkpoint(engine: PretrainEngine, path: Path) -> RunState:
    """Restores weights, optimizer state and position on any number of ranks and any ep_size. Collective."""
    state = read_state(path)
    expected = json.loads(engine.objective.transformer.config.model_dump_json())
    if state.model != expected:
        changed = [key for key in expected if state.model.get(key) != expected[key]]
        lines = [f"model.{key}: {state.model.get(key)!r} there, {expected[key]!r} now" for key in changed]
        raise UserError(
            f"{path}: the checkpoint's model differs from the recipe's ({'; '.join(lines)}); "
            "restore the recipe or choose another output_dir"
        )
    load_fragments(fragments(engine.objective, engine.zero), path)
    engine.restored(state.adam_step)
    return state


def read_state(path: Path) -> RunState:
    try:
        return RunState(**json.loads((path / "run.json").read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a checkpoint of this project: {error}") from error


def export_weights(engine: PretrainEngine, directory: Path) -> None:
    """Writes the model's fp32 masters as safetensors + config.json, over what is there. Collective."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    if distributed.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    save_fragments(fragments(engine.objective, engine.zero, kinds=("master",)), temporary / "fragments")
    if distributed.is_main():
        _convert(temporary / "fragments", engine.objective.transformer.config, temporary / "weights")
        _publish(temporary / "weights", directory)
        shutil.rmtree(temporary)
    dist.barrier()


def export_checkpoint(checkpoint: Path, directory: Path) -> None:
    """`mepa export`: a checkpoint's weights as safetensors + config.json, in one process, without DeepSpeed."""
    config = validate(ModelConfig, dict(read_state(checkpoint).model), str(checkpoint))
    _convert(checkpoint, config, directory)


def _convert(fragment_directory: Path, config: ModelConfig, directory: Path) -> None:
    from mepa_ds.models.transformer import NextScaleTransformer

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in NextScaleTransformer(config).state_dict().items()}
    flat = read_whole(fragment_directory, "master")
    weights = {name: flat[TRANSFORMER + name].view(shape) for name, shape in shapes.items()}
    save_pretrained(directory, config, weights, KIND)


def _publish(temporary: Path, target: Path) -> None:
    """Gives a complete directory its final name; what had that name before is gone only afterwards."""
    fsync_directory(temporary)
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.rename(target, aside)
    os.rename(temporary, target)
    fsync_directory(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
