"""A small study for tests: a recipe of a tiny run without its data, and a study file over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mepa_ds.config.base import validate
from mepa_ds.scaling.study.config import StudyConfig
from tests.tiny_run import recipe_values


def base_recipe(folder: Path, **changes: Any) -> Path:
    values = recipe_values(folder)
    values["objective"]["alignment"] = None
    values["data"]["features"] = None
    values["model"] = {key: value for key, value in values["model"].items() if key != "moe"} | {"drop_path": 0.0}
    values |= changes
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def study_values(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "base": str(base_recipe(folder)),
        "output_dir": str(folder / "study"),
        "head_width": 16,
        "grids": {"dense": {"sizes": ["d1w16", "d1w32", "d2w48"], "samples": [80, 160, 320]}},
        "lr": {"rule": "fixed", "peak": 1e-3},
    } | changes


def study_of(folder: Path, **changes: Any) -> StudyConfig:
    return validate(StudyConfig, study_values(folder, **changes), "study.yaml")
