"""A checkpoint on disk: what is in its directory, whether it is whole, and its weights. Needs no DeepSpeed.

A checkpoint is a directory `step_<number>`: DCP files with every parameter's fp32 master and Adam moments, `run.json`
with everything else, and `manifest.json`, written last, with size and SHA-256 of all these. It is written under
another name and renamed when complete, so a directory with this name was a whole checkpoint once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.engine.fragment_store import BUFFER, MASTER, read_tensors, stored_tensors
from mepa_ds.errors import UserError
from mepa_ds.files import fsync_directory, sha256_of_file, write_json
from mepa_ds.models.transformer import KIND
from mepa_ds.weights import save_pretrained

_NAME = re.compile(r"step_(\d{8,})")
TRANSFORMER = "transformer."
RUN_NAME, MANIFEST_NAME = "run.json", "manifest.json"
_DAMAGED = ".damaged"
_COMPARED_AT_ONCE = 32


@dataclass
class RunState:
    """What a run is, besides tensors. All of it is independent of the number of ranks.

    There is no state of random generators: every random number of a run is a function of (seed, position).
    """

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Images consumed: the position in the endless sample stream."""
    adam_step: int = 0
    """Steps that Adam has seen (skipped ones are not among them)."""
    best_heldout_ce: float = float("inf")
    """Lowest held-out cross-entropy so far (inf before the first evaluation)."""
    evaluated_step: int = 0
    """Step of the last held-out evaluation."""
    metrics_records: int = 0
    """Records in metrics.jsonl: those after them belong to steps that are taken again."""
    loss_scaler: dict[str, float] = field(default_factory=dict)
    """fp16's dynamic loss scale."""
    data: dict[str, str] = field(default_factory=dict)
    """Identities of what the order and content of the samples depend on, by key of the recipe."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of this package and the libraries that wrote the checkpoint."""


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def read_state(path: Path) -> RunState:
    """Raises UserError for a directory that holds no checkpoint of this project."""
    try:
        return RunState(**json.loads((path / RUN_NAME).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint of this project: {error}") from error


def complete(directory: Path, state: RunState, digests: dict[str, dict[str, Any]]) -> None:
    """Adds run.json and manifest.json to a directory of fragments; `digests` are those of the ranks' files."""
    write_json(directory / RUN_NAME, asdict(state))
    for name in (RUN_NAME, ".metadata"):
        digests[name] = digest(directory / name)
    write_json(directory / MANIFEST_NAME, {"files": digests})


def digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def find_damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """Compares size and SHA-256 of every `parts`-th file, from number `part` on; says what is wrong, if anything is."""
    try:
        files = json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]
        for name in sorted(files)[part::parts]:
            if (checkpoint / name).stat().st_size != files[name]["bytes"]:
                return f"{name} has {(checkpoint / name).stat().st_size} bytes, not {files[name]['bytes']}"
            if sha256_of_file(checkpoint / name) != files[name]["sha256"]:
                return f"{name} is not what was written (SHA-256)"
    except (OSError, KeyError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def set_aside(checkpoint: Path) -> None:
    """A damaged checkpoint is kept for inspection, but never picked up or counted again."""
    target = checkpoint.with_name(checkpoint.name + _DAMAGED)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(checkpoint, target)


def publish(temporary: Path, target: Path) -> None:
    """Gives a complete directory its final name; what had that name before is gone only afterwards."""
    fsync_directory(temporary)
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.rename(target, aside)
    os.rename(temporary, target)
    fsync_directory(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def prune(directory: Path, keep: int, keep_every: int | None) -> None:
    """Deletes all but the newest `keep` checkpoints and those of every `keep_every`-th step."""
    for old in list_checkpoints(directory)[:-keep]:
        if keep_every is None or step_of(old) % keep_every:
            aside = old.with_name(f".{old.name}.old")
            os.rename(old, aside)
            shutil.rmtree(aside, ignore_errors=True)


def clean(directory: Path) -> None:
    """Removes what a killed run was writing or deleting."""
    for pattern in (".*.tmp", ".*.old"):
        for path in directory.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def export_checkpoint(checkpoint: Path, directory: Path, kind: str = MASTER) -> None:
    """A checkpoint's weights (`kind` master or ema) as safetensors + config.json, in one process."""
    if (damage := find_damage(checkpoint)) is not None:
        raise UserError(f"{checkpoint}: damaged: {damage}; export an older checkpoint")
    config = validate(ModelConfig, dict(read_state(checkpoint).recipe["model"]), str(checkpoint))
    convert_fragments(checkpoint, config, directory, kind)


def convert_fragments(fragments: Path, config: ModelConfig, directory: Path, kind: str) -> None:
    """Fragments of at least `kind` and the buffers -> the Hugging Face layout."""
    from mepa_ds.models.transformer import NextScaleTransformer

    with torch.device("meta"):
        model = NextScaleTransformer(config)
    parameters = {name for name, _ in model.named_parameters()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    sources = {name: f"{kind if name in parameters else BUFFER}/{TRANSFORMER}{name}" for name in shapes}
    flat = read_tensors(fragments, sources.values())
    weights = {name: flat[source].view(shapes[name]) for name, source in sources.items()}
    save_pretrained(directory, config, weights, KIND)


def differences(first: Path, second: Path) -> Iterator[str]:
    """What differs between two checkpoints, a line each; nothing when they are the same run state bit by bit."""
    ours, theirs = (_flatten(asdict(read_state(path))) for path in (first, second))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield f"{key}: {ours.get(key)!r} -> {theirs.get(key)!r}"
    left, right = stored_tensors(first), stored_tensors(second)
    for name in sorted(left.keys() ^ right.keys()):
        yield f"{name}: only in {first if name in left else second}"
    common = [name for name in sorted(left.keys() & right.keys()) if left[name].size == right[name].size]
    for name in sorted((left.keys() & right.keys()) - set(common)):
        yield f"{name}: {left[name].size.numel()} elements -> {right[name].size.numel()}"
    for start in range(0, len(common), _COMPARED_AT_ONCE):
        names = common[start : start + _COMPARED_AT_ONCE]
        a, b = read_tensors(first, names), read_tensors(second, names)
        for name in names:
            if not torch.equal(a[name], b[name]):
                change = (a[name].double() - b[name].double()).abs().max()
                yield f"{name}: {int((a[name] != b[name]).sum())} of {len(a[name])} differ, by at most {change:.3e}"


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
