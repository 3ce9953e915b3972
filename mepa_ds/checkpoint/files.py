"""A checkpoint on disk: what is in its directory, whether it is whole, and its weights. Needs no DeepSpeed.

A checkpoint is a directory `step_<number>`: DCP files with every parameter's fp32 master and Adam moments, `run.json`
with everything else, and `manifest.json`, written last, with size and SHA-256 of all these. It is written under
another name and renamed when complete, so a directory with this name was a whole checkpoint once.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mepa_ds import log
from mepa_ds.checkpoint.store import BUFFER, EMA, MASTER, read_tensors, stored_tensors
from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.errors import UserError
from mepa_ds.files import fsync_directory, make_way, remove, sha256_of_file, write_json
from mepa_ds.models.transformer_files import KIND
from mepa_ds.weights.directories import CONFIG_NAME, save_pretrained

_NAME = re.compile(r"step_(\d{8,})")
TRANSFORMER = "transformer."
RUN_NAME, MANIFEST_NAME = "run.json", "manifest.json"
WEIGHTS_FACTS_NAME = "training.json"
_DAMAGED = ".damaged"
# What a killed run may leave half-written or half-deleted. Exports have their names from the training loop.
_UNFINISHED = re.compile(r"\.(step_\d{8,}|best|last|last_ema)\.(tmp|old|pruned)(\.left\d+)?")
_RETRY_SECONDS = 1.0
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
    skipped_steps: int = 0
    """Steps that were skipped because something was not finite, also those of which a rollback took the rest back."""
    replaced_samples: int = 0
    """Damaged samples that others took the place of (data.on_damaged = "skip"), up to the last logged step."""
    window: dict[str, Any] = field(default_factory=dict)
    """Sums of the steps since the last record in metrics.jsonl (pretrain.window); empty if a record has just been."""
    loss_scaler: dict[str, float] = field(default_factory=dict)
    """fp16's dynamic loss scale."""
    data: dict[str, str] = field(default_factory=dict)
    """Identities of what the order and content of the samples depend on, by key of the recipe."""
    heldout: str = ""
    """Identity of the held-out tokens: `best_heldout_ce` is of them."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of this package and the libraries that wrote the checkpoint."""


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


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
    """Adds run.json and manifest.json to a directory of fragments; `digests` are those of the ranks' files.

    Raises OSError when a rank's file is not here: its node writes to another file system.
    """
    for name, expected in digests.items():
        if not (directory / name).exists() or (directory / name).stat().st_size != expected["bytes"]:
            raise OSError(f"{directory / name} was written by a rank, but is not there: output_dir must be shared")
    write_json(directory / RUN_NAME, asdict(state))
    for name in (RUN_NAME, ".metadata"):
        digests[name] = digest(directory / name)
    write_json(directory / MANIFEST_NAME, {"files": digests})


def digest(path: Path, on_progress: Callable[[], object] = lambda: None) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path, lambda _: on_progress())}


def find_damage(
    checkpoint: Path, part: int = 0, parts: int = 1, on_progress: Callable[[], object] = lambda: None
) -> str | None:
    """Compares size and SHA-256 of every `parts`-th file, from number `part` on; says what is wrong, if anything is.

    A read that fails is tried once more: a passing error of a file system is no damage.
    """
    for attempt in (1, 2):
        try:
            return _compare_with_manifest(checkpoint, part, parts, on_progress)
        except OSError as error:
            if attempt == 2 or isinstance(error, FileNotFoundError):
                return f"{type(error).__name__}: {error}"
            time.sleep(_RETRY_SECONDS)
        except (KeyError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return None


def _compare_with_manifest(checkpoint: Path, part: int, parts: int, on_progress: Callable[[], object]) -> str | None:
    files = json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]
    for name in sorted(files)[part::parts]:
        if (checkpoint / name).stat().st_size != files[name]["bytes"]:
            return f"{name} has {(checkpoint / name).stat().st_size} bytes, not {files[name]['bytes']}"
        if sha256_of_file(checkpoint / name, lambda _: on_progress()) != files[name]["sha256"]:
            return f"{name} is not what was written (SHA-256)"
    return None


def set_aside(checkpoint: Path) -> None:
    """A damaged checkpoint is kept for inspection, but never picked up or counted again."""
    target = checkpoint.with_name(checkpoint.name + _DAMAGED)
    make_way(target)
    os.rename(checkpoint, target)


def publish(temporary: Path, target: Path) -> None:
    """Gives a complete directory its final name; what had that name before is gone only afterwards.

    A link of that name (to another disk, say) is replaced, and what it leads to stays: a directory appears at once,
    complete, only where it was written.
    """
    fsync_directory(temporary)
    aside = target.with_name(f".{target.name}.old")
    make_way(aside)
    if os.path.lexists(target):
        if target.is_symlink():
            log.note(
                f"warning: {target} was a link to {os.readlink(target)}, and is a directory now; what the link led to "
                "stays as it was"
            )
        os.rename(target, aside)
    os.rename(temporary, target)
    fsync_directory(target.parent)
    remove(aside)


def prune(directory: Path, keep: int, keep_every: int | None) -> None:
    """Deletes all but the newest `keep` checkpoints and those of every `keep_every`-th step.

    One that cannot be deleted is told of once, and stays.
    """
    for old in list_checkpoints(directory)[:-keep]:
        if keep_every is None or step_of(old) % keep_every:
            aside = old.with_name(f".{old.name}.pruned")
            try:
                make_way(aside)
                os.rename(old, aside)
            except OSError as error:
                _say_once(f"warning: {old} cannot be deleted ({error.strerror}); log.keep_checkpoints would have it so")
            remove(aside)


@functools.cache
def _say_once(line: str) -> None:
    log.note(line)


def clean(directory: Path) -> None:
    """Removes what a killed run was writing or deleting, and nothing else that lies there."""
    for path in list(directory.glob(".*")):
        match = _UNFINISHED.fullmatch(path.name)
        if match is None:
            continue
        target = directory / match[1]
        if match[2] == "old" and match[3] is None and path.is_dir() and not target.exists():
            make_way(target)  # a link that leads nowhere
            os.rename(path, target)  # killed between the two renames of `publish`: the new one is not there yet
        elif not remove(path):
            _say_once(f"warning: {path}, a leftover, cannot be removed; remove it when nothing uses it")


def export_checkpoint(checkpoint: Path, directory: Path, kind: str = MASTER) -> None:
    """A checkpoint's weights (`kind` master or ema) as safetensors + config.json, in one process."""
    if not is_checkpoint_name(checkpoint.name) and not (checkpoint / MANIFEST_NAME).exists():
        of_a_run = list_checkpoints(checkpoint / "checkpoints")
        newest = f"; the newest of this run is {of_a_run[-1]}" if of_a_run else ""
        raise UserError(f"{checkpoint}: no checkpoint (a directory <output_dir>/checkpoints/step_...){newest}")
    if (damage := find_damage(checkpoint)) is not None:
        raise UserError(f"{checkpoint}: damaged: {damage}; export an older checkpoint")
    state = read_state(checkpoint)
    if kind == EMA and state.recipe["optim"].get("ema") is None:
        raise UserError(f"{checkpoint}: has no average of the weights: the run was without optim.ema")
    config = validate(ModelConfig, dict(state.recipe["model"]), str(checkpoint))
    convert_fragments(checkpoint, config, directory, kind, state.step)


def has_weights(directory: Path) -> bool:
    """Whether a whole export is there."""
    return (directory / CONFIG_NAME).is_file()


def step_of_weights(directory: Path) -> int | None:
    """The step that exported weights are of; None where there are none, or it is not known."""
    try:
        return int(json.loads((directory / WEIGHTS_FACTS_NAME).read_text())["step"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def convert_fragments(
    fragments: Path,
    config: ModelConfig,
    directory: Path,
    kind: str,
    step: int,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Fragments of at least `kind` and the buffers -> the Hugging Face layout, with a note of the step."""
    from mepa_ds.models.transformer import NextScaleTransformer

    with torch.device("meta"):
        model = NextScaleTransformer(config)
    parameters = {name for name, _ in model.named_parameters()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    sources = {name: f"{kind if name in parameters else BUFFER}/{TRANSFORMER}{name}" for name in shapes}
    flat = read_tensors(fragments, sources.values(), on_progress)
    weights = {name: flat[source].view(shapes[name]) for name, source in sources.items()}
    save_pretrained(directory, config, weights, KIND)
    write_json(directory / WEIGHTS_FACTS_NAME, {"step": step})


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
