"""Recipes on the page: what differs between runs, and which differences make their curves another thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mepa_ds.config.changes import flatten

ABSENT = "(no such key)"
_MATTERS = {
    "the schedule": ("optim", "train"),
    "the seed": ("seed",),
    "the tokenizer": ("tokenizer",),
    "the held-out set": ("data.heldout_tokens", "data.heldout_images"),
    "the training data": ("data.tokens", "data.images", "data.unique_images", "data.features"),
}
_WHY = {
    "the schedule": "at one step a run may be nearer to the end of its learning rate than another: compare ends",
    "the seed": "the order of images and the first weights differ, so small differences may be chance",
    "the tokenizer": "cross-entropy counts other tokens: losses of different tokenizers cannot be compared",
    "the held-out set": "held-out scores are of other images and cannot be compared",
    "the training data": "the runs learn from other images, so their training losses are not of the same task",
}
_NOT_RECIPE = ("output_dir",)


def differences(names: Sequence[str], recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Returns (key, a value of each run) of what is not the same in all recipes; nothing for one run."""
    if len(recipes) < 2:
        return []
    flat = [flatten(dict(recipe)) for recipe in recipes]
    keys = sorted({key for values in flat for key in values} - set(_NOT_RECIPE))
    rows = [(key, [shown(values.get(key, ABSENT)) for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def comparison_warnings(differing: Sequence[tuple[str, list[str]]], tokenizer_runs: bool) -> list[str]:
    """Returns the sentences that a reader of overlaid runs must see. `tokenizer_runs`: the runs train tokenizers."""
    found = []
    for what, prefixes in _MATTERS.items():
        if tokenizer_runs and what == "the tokenizer":
            continue  # it is what the runs make
        keys = [key for key, _ in differing if any(_is_in(key, prefix) for prefix in prefixes)]
        if keys:
            listed = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            found.append(f"The runs differ in {what} ({listed}): {_WHY[what]}.")
    if any(key == "log.every" for key, _ in differing):
        found.append("The runs log at other intervals (log.every): a record of more steps is less noisy by itself.")
    return found


def _is_in(key: str, part: str) -> bool:
    return key == part or key.startswith(f"{part}.")


def shown(value: Any) -> str:
    return "null" if value is None else str(value)
