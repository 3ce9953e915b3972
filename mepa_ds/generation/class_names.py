"""Names of classes for captions: those of the images that a run was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mepa_ds.config.base import read_yaml
from mepa_ds.config.paths import expand_path
from mepa_ds.data.shards.index import ShardIndex
from mepa_ds.errors import UserError

RECIPE_NAME = "resolved.yaml"


def caption(label: int, names: Sequence[str]) -> str:
    """The class as a person reads it: `3 Dress`; `class 3` where the data have no name for it, or a mere number."""
    name = names[label] if label < len(names) else ""
    return f"class {label}" if name in ("", str(label)) else f"{label} {name}"


def spread_classes(num_classes: int, most: int) -> list[int]:
    """Up to `most` classes, evenly over all."""
    count = min(num_classes, most)
    return [place * num_classes // count for place in range(count)]


def names_beside(weights: Path) -> tuple[str, ...]:
    """Names of the classes, for weights in the directory of a run (`RUN/best`) whose data can be found.

    Empty for weights from elsewhere, and for data without names or in another place than at the time of the run: names
    are for captions, which do without them.
    """
    try:
        data = read_yaml(weights.parent / RECIPE_NAME)["data"]
        return ShardIndex.read(expand_path(data["tokens"] or data["images"])).classes
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return ()
