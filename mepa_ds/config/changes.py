"""What is different in a recipe since another start of the same run."""

from __future__ import annotations

from typing import Any

_ABSENT = "absent"


def recipe_changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """[old, new] by key (`train.steps`) of two resolved recipes, as JSON has them; "absent" where there is no such key.

    Keys that are newer than the old recipe, and have nothing set, are no change.
    """
    return {key: pair for key, pair in changed(old, new, _ABSENT).items() if pair != [_ABSENT, None]}


def changed(old: dict[str, Any], new: dict[str, Any], absent: Any = None) -> dict[str, list[Any]]:
    """[old, new] by dotted key of what differs between two nested mappings; `absent` stands for a missing key."""
    before, now = flatten(old), flatten(new)
    pairs = {key: [before.get(key, absent), now.get(key, absent)] for key in sorted(before.keys() | now.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def changes_in_words(changes: dict[str, list[Any]]) -> str:
    listed = ", ".join(f"{key} {_word(old)} -> {_word(new)}" for key, (old, new) in changes.items())
    return f"the recipe has changed since the last checkpoint: {listed}"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _word(value: Any) -> str:
    return "null" if value is None else str(value)
