"""`mepa checkpoint`: what checkpoints a run has, whether they are whole, and how two of them differ."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.errors import UserError


@dataclass
class Ls:
    """Lists a run's checkpoints, oldest first: step, images seen, size, date."""

    run: tyro.conf.Positional[Path]
    """output_dir of a pretraining run."""


@dataclass
class Verify:
    """Compares every file of checkpoints with the sizes and SHA-256 in their manifests; status 1 if one is damaged."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoint directories, such as <output_dir>/checkpoints/step_00001000, or whole runs."""


@dataclass
class Diff:
    """Prints what differs between two checkpoints: state, recipe, tensors. Status 1 if anything does."""

    first: tyro.conf.Positional[Path]
    """A checkpoint directory."""
    second: tyro.conf.Positional[Path]
    """Another one; the ranks and ep_size that wrote them need not be the same."""


Command = (
    Annotated[Ls, tyro.conf.subcommand("ls")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
)


def main(argv: list[str]) -> None:
    options = tyro.cli(Command, prog="mepa checkpoint", args=argv, description=__doc__)  # type: ignore[call-overload]
    if isinstance(options, Ls):
        _list(options.run)
    elif isinstance(options, Verify):
        sys.exit(_verify(options.checkpoints))
    else:
        sys.exit(_compare(options))


def _found(path: Path) -> list[Path]:
    """A checkpoint itself, or those of a run."""
    from mepa_ds.checkpoint.files import is_checkpoint_name, list_checkpoints
    from mepa_ds.checkpoint.state import RUN_NAME

    if (path / RUN_NAME).exists() or (path.is_dir() and is_checkpoint_name(path.name)):
        return [path]
    if found := list_checkpoints(path / "checkpoints"):
        return found
    raise UserError(f"{path}: neither a checkpoint nor a run with checkpoints")


def _list(run: Path) -> None:
    from mepa_ds.checkpoint.state import read_state

    for path in _found(run):
        try:
            images = f"{read_state(path).position} images"
        except UserError:
            images = "DAMAGED: run.json"
        size = sum(file.stat().st_size for file in path.iterdir())
        date = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
        log.say(f"{path.name}  {images:>19}  {size / 1e6:>10.1f} MB  {date}")


def _verify(paths: tuple[Path, ...]) -> int:
    from mepa_ds.checkpoint.files import find_damage

    if not paths:
        raise UserError("give at least one checkpoint, or the output_dir of a run")
    damaged = 0
    for checkpoint in [found for path in paths for found in _found(path)]:
        damage = find_damage(checkpoint)
        damaged += damage is not None
        log.say(f"{checkpoint}: {'whole' if damage is None else 'DAMAGED: ' + damage}")
    return int(damaged > 0)


def _compare(options: Diff) -> int:
    from mepa_ds.checkpoint.compare import differences

    lines = list(differences(options.first, options.second))
    log.say("\n".join(lines) if lines else "no difference")
    return int(bool(lines))


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
