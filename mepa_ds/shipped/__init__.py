"""Where the files are that come with the code: recipes, DeepSpeed's knobs, batch scripts and cluster profiles.

In a clone they lie in folders beside the package, to which the links in this directory lead. A wheel has copies here.
"""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("ds_configs", "recipes", "slurm")
_HERE = Path(__file__).parent
_BESIDE = _HERE.parents[1]
CLONE = _BESIDE if (_BESIDE / "slurm/lib.sh").is_file() else None
"""The clone of the repository that this package is part of; None: it is installed."""


def folder(name: str) -> Path:
    """Of `FOLDERS`: the clone's, or the installed one."""
    return (CLONE or _HERE) / name


def find(path: Path) -> Path:
    """`recipes/quickstart.yaml` and its like are there from any directory, unless the working directory has its own.

    What is not shipped is returned as it is.
    """
    if path.parts[:1] and path.parts[0] in FOLDERS and not path.exists():
        shipped = folder(path.parts[0]).joinpath(*path.parts[1:])
        return shipped if shipped.exists() else path
    return path
