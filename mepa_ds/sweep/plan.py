"""From the file of a sweep to recipes and the table of runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mepa_ds import shipped
from mepa_ds.config.base import read_yaml
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.scaling.running.planned import Planned
from mepa_ds.scaling.study import directory
from mepa_ds.scaling.study.variants import plan_row, variant
from mepa_ds.sweep.config import SweepConfig

_LONGEST_NAME = 100


def read_sweep(path: Path) -> SweepConfig:
    """Reads the file of a sweep, or the one in the output_dir of a planned one; see `directory.read_file`."""
    return directory.read_file(SweepConfig, path, "sweep")


def make_plan(sweep: SweepConfig) -> tuple[list[dict[str, Any]], dict[str, PretrainConfig]]:
    """Multiplies the sweep out and checks it: a row for each run, and the recipes by run. Writes nothing.

    A run is named by its values and its seed. So runs stay what they are when values are added to the file.

    Raises:
        UserError: a recipe is wrong, or two points are the same.
    """
    base = read_yaml(shipped.find(sweep.base))
    rows: list[dict[str, Any]] = []
    recipes: dict[str, PretrainConfig] = {}
    seen: dict[str, str] = {}
    for number in range(sweep.seeds):
        for point in sweep.all_points:
            name = f"{_name_of(point)}-s{number}"
            where = f"{sweep.name}: {_in_words(point)}"
            config = variant(base, point, number, sweep.output_dir / "runs" / name, where)
            content = config.model_dump_json(exclude={"output_dir", "log"})
            if content in seen or name in recipes:
                raise UserError(f"{where}: is the same run as {seen.get(content, name)}; leave one of them out")
            seen[content], recipes[name] = _in_words(point), config
            recipe = sweep.output_dir / "recipes" / f"{name}.yaml"
            rows.append(plan_row(name, config, recipe) | {"changes": point})
    return rows, recipes


def _name_of(point: Mapping[str, Any]) -> str:
    last = [key.rpartition(".")[2] for key in point]
    short = last if len(set(last)) == len(last) else list(point)
    words = [f"{key}={json.dumps(value)}" for key, value in zip(short, point.values(), strict=True)]
    name = re.sub(r"[^A-Za-z0-9.=,_-]+", "-", ",".join(words)).replace("=", "-").strip("-") or "base"
    digest = hashlib.sha256(json.dumps(dict(point)).encode()).hexdigest()[:8]
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 9]}-{digest}"


def _in_words(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in point.items()) or "the base recipe"


def planned(sweep: SweepConfig) -> Planned:
    """The sweep's plan."""
    content = json.loads(sweep.model_dump_json(include={"name", "seeds", "grid", "points"}))
    place = (sweep.name, sweep.base, sweep.output_dir, sweep.ranks)
    return Planned("sweep", "mepa sweep", sweep, *place, content, partial(make_plan, sweep))
