"""The file of an ablation: which arms it has. Strict YAML, as a recipe is."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator
from typing_extensions import Self

from mepa_ds.config.base import Section
from mepa_ds.config.values import PositiveInt, UserPath

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]

_OWNED = (
    "seed",
    "output_dir",
    "train",
    "data.tokens",
    "data.images",
    "data.heldout_tokens",
    "tokenizer",
    "branch_from",
)
"""Keys that are the same in all arms, or that the planner sets."""


class Arm(Section):
    """One variant of the base recipe."""

    title: str
    """What it is, in a few words, for tables and figures."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe and their values, such as `objective.alignment: null`."""


class AblationConfig(Section):
    """An ablation: arms x seeds, all of the same length and the same active FLOPs."""

    name: Name
    """Of the ablation; a directory that holds another one is refused."""
    base: UserPath
    """The recipe that all arms start from. Its log.score says how generated images are scored."""
    output_dir: UserPath
    """Where recipes, runs and the report go."""
    arms: Annotated[dict[Name, Arm], Field(min_length=2)]
    """The variants, by a short name."""
    baseline: Name
    """The arm that all others are compared with."""
    compare: tuple[tuple[Name, Name], ...] = ()
    """Further comparisons: pairs of arms, the second one the reference."""
    seeds: Annotated[int, Field(ge=2)] = 3
    """Runs of each arm; seeds are the base recipe's and the next ones. Runs of one seed see the same images in the same
    order."""
    ranks: PositiveInt = 1
    """Processes of each run."""
    flops_tolerance: Annotated[float, Field(ge=0)] = 0.03
    """Share by which the active FLOPs of an arm may differ from the baseline's; the projector of guidance is apart."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in (self.baseline, *(name for pair in self.compare for name in pair)):
            if name not in self.arms:
                raise ValueError(f"no arm {name!r}; arms are {', '.join(self.arms)}")
        for pair in self.compare:
            if pair[0] == pair[1] or self.compare.count(pair) > 1:
                raise ValueError(f"compare: {pair[0]} with {pair[1]}: name two arms, and each pair once")
        for name, arm in self.arms.items():
            for key in arm.set:
                if any(key == own or key.startswith(f"{own}.") for own in _OWNED):
                    raise ValueError(f"arms: {name}: {key} must be the same in all arms; set it in the base recipe")
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(arm, what it is compared with): all arms with the baseline, then `compare`."""
        return [(arm, self.baseline) for arm in self.arms if arm != self.baseline] + [
            pair for pair in self.compare if pair[1] != self.baseline
        ]
