"""What is different in a recipe since another start of the same run."""

from __future__ import annotations

from typing import Any

_ABSENT = "absent"


def recipe_changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """[old, new] by key (`train.steps`) of two resolved recipes, as JSON has them; "absent" where there is no such key.

    Keys that are newer than the old recipe, and have nothing set, are no change.
    """
    before, now = _flat(old), _flat(new)
    changes = {}
    for key in sorted(before.keys() | now.keys()):
        pair = [before.get(key, _ABSENT), now.get(key, _ABSENT)]
        if pair[0] != pair[1] and pair != [_ABSENT, None]:
            changes[key] = pair
    return changes


def changes_in_words(changes: dict[str, list[Any]]) -> str:
    listed = ", ".join(f"{key} {_word(old)} -> {_word(new)}" for key, (old, new) in changes.items())
    return f"the recipe has changed since the last checkpoint: {listed}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _word(value: Any) -> str:
    return "null" if value is None else str(value)
