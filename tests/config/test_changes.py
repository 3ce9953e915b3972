"""What is said of a recipe that has changed between two starts of a run."""

from __future__ import annotations

from mepa_ds.config.changes import changes_in_words, recipe_changes


def test_changes_are_named_by_their_keys() -> None:
    old = {"seed": 0, "train": {"steps": 100, "epochs": None}, "model": {"moe": {"top_k": 2}}, "gone": 1}
    new = {"seed": 0, "train": {"steps": 200, "epochs": None}, "model": {"moe": None}}
    assert recipe_changes(old, new) == {
        "gone": [1, "absent"],
        "model.moe.top_k": [2, "absent"],
        "train.steps": [100, 200],
    }
    words = changes_in_words({"train.steps": [100, 200], "log.wandb": ["x", None]})
    assert words == "the recipe has changed since the last checkpoint: train.steps 100 -> 200, log.wandb x -> null"


def test_what_is_newer_than_the_old_recipe_is_a_change_only_if_it_is_set() -> None:
    assert recipe_changes({"a": 1}, {"a": 1, "b": None, "c": {"d": None}}) == {}
    assert recipe_changes({"a": 1}, {"a": 1, "b": 0}) == {"b": ["absent", 0]}
    assert recipe_changes({"a": {}, "list": [1]}, {"a": {}, "list": [1, 2]}) == {"list": [[1], [1, 2]]}
