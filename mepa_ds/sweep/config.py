"""The file of a sweep: which keys of a recipe take which values. Strict YAML, as a recipe is."""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any

from pydantic import Field, model_validator
from typing_extensions import Self

from mepa_ds.config.base import Section
from mepa_ds.config.values import PositiveInt, UserPath

_OWNED = ("seed", "output_dir", "branch_from")


class SweepConfig(Section):
    """A sweep: points x seeds. The points are every combination of `grid`, or those of `points`, or both combined."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Of the sweep; a directory that holds another one is refused."""
    base: UserPath
    """The recipe that all runs start from."""
    output_dir: UserPath
    """Where recipes, runs and the table go."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Values by key of the recipe, such as `optim.base_lr: [1.0e-4, 2.0e-4]`; every combination is a point."""
    points: tuple[dict[str, Any], ...] = ()
    """Points one by one: values by key of the recipe."""
    seeds: PositiveInt = 1
    """Runs of each point; seeds are the base recipe's and the next ones."""
    ranks: PositiveInt = 1
    """Processes of each run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.grid and not self.points:
            raise ValueError("nothing is swept; give grid: (values by key) or points: (a list)")
        for key in (*self.grid, *(key for point in self.points for key in point)):
            if key in _OWNED:
                raise ValueError(f"{key}: is set by the sweep; leave it out (seeds: N trains each point N times)")
        for point in self.points:
            if both := self.grid.keys() & point.keys():
                raise ValueError(f"{min(both)}: stands in grid and in points; leave it out of one of them")
        return self

    @property
    def all_points(self) -> tuple[dict[str, Any], ...]:
        """The changes of each point, by key."""
        combinations = [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]
        return tuple({**point, **values} for point in self.points or ({},) for values in combinations)
