"""Values of a recipe for batch scripts: `python -m mepa_ds.slurm.in_job.recipe_value KEY RECIPE [key=value ...]`.

It needs no torch, so that a batch script has its answer at once. The job itself validates the recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mepa_ds import log, shipped
from mepa_ds.config.base import apply_overrides, read_yaml
from mepa_ds.config.paths import given_path
from mepa_ds.config.values import HUB
from mepa_ds.errors import UserError
from mepa_ds.safety.text import printable

SET_KEYS = ("data.tokens", "data.features", "data.heldout_tokens", "data.images", "data.heldout_images")
"""Keys of recipes for shard sets."""
PATH_KEYS = (
    "tokenizer",
    *SET_KEYS,
    "data.teacher.weights",
    "init_weights",
    "branch_from",
    "start_from",
    "loss.perceptual.backbone_weights",
    "parallel.deepspeed",
)
"""Keys of recipes under which a run reads files."""
OUTPUT_KEY = "output_dir"


def recipe_paths(recipe: Path, overrides: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
    """(key, path) of all files that a run reads, without what timm downloads and what a resumed run began with."""
    run = Path(str(recipe_value(OUTPUT_KEY, recipe, overrides)))
    resumes = (run / "checkpoint.pt").exists() or any((run / "checkpoints").glob("step_*"))
    for key in PATH_KEYS:
        if resumes and key in ("init_weights", "branch_from", "start_from"):
            continue
        value = recipe_value(key, recipe, overrides)
        if isinstance(value, str) and (key, value) != ("data.teacher.weights", HUB):
            yield key, shipped.find(Path(value))


def recipe_value(key: str, recipe: Path, overrides: Sequence[str] = ()) -> Any:
    """The value of a dotted key after the overrides, with paths expanded; None if there is no value.

    Raises:
        UserError: the recipe cannot be read, or the path not be expanded.
    """
    value: Any = apply_overrides(read_yaml(shipped.find(recipe)), overrides)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, str) and key in (OUTPUT_KEY, *PATH_KEYS):
        return str(given_path(value, f"{recipe}: {key}"))
    return value


def main(argv: Sequence[str]) -> None:
    if len(argv) < 2:
        raise UserError("a recipe is missing: give its path")
    key, recipe, *overrides = argv
    value = recipe_value(key, given_path(recipe, "recipe"), overrides)
    if value is None:
        raise UserError(f"{recipe}: {key}: required, but not given")
    if printable(value) != str(value):  # a shell would take it for several words, or cut it
        raise UserError(f"{recipe}: {key}: {value!r} has a line break or control character in it; choose another name")
    log.answer(str(value))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        log.note(f"error: {error}")
        sys.exit(2)
