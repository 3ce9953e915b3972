"""Types of values that several sections have: positive integers, and paths and spans of time, as people write them."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mepa_ds.config.paths import expand_path

HUB = "hub"
"""In place of a path: weights that timm is to download."""
# SLURM's notations of a time: [days-]hours[:minutes[:seconds]], minutes:seconds and hours:minutes:seconds.
_DAYS = re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+))?(?::(?P<seconds>\d+))?")
_CLOCK = re.compile(r"(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)")
_UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def _expand(value: Any) -> Any:
    """Other types are for the type itself to refuse."""
    if isinstance(value, Path):
        return expand_path(str(value))
    return str(expand_path(value)) if isinstance(value, str) else value


def _expand_unless_hub(value: Any) -> Any:
    return value if value == HUB else _expand(value)


def _refuse_clock(value: Any, unit: str) -> Any:
    """`12:00:00` is half a day to SLURM's users; what stands in a recipe is a number."""
    found = (_DAYS.fullmatch(value) or _CLOCK.fullmatch(value)) if isinstance(value, str) else None
    if found is None:
        return value
    parts = {name: int(digits) for name, digits in found.groupdict().items() if digits is not None}
    seconds = sum(_UNITS[name] * number for name, number in parts.items())
    raise ValueError(f"a number of {unit}; {value} ({':'.join(parts)}) is {seconds / _UNITS[unit]:g}")


RemoteScheme = Literal["pipe", "file", "sftp", "scp"]
"""A scheme that the remote.json of a shard set may use only at the user's word (mepa_ds.data.remote.schemes)."""
PositiveInt = Annotated[int, Field(gt=0)]
UserPath = Annotated[Path, BeforeValidator(_expand)]
"""A path in any section: see `expand_path`."""
PathOrHub = Annotated[str, BeforeValidator(_expand_unless_hub)]
"""The same, or `hub`."""
Minutes = Annotated[float, Field(gt=0), BeforeValidator(partial(_refuse_clock, unit="minutes"))]
Seconds = Annotated[float, Field(gt=0), BeforeValidator(partial(_refuse_clock, unit="seconds"))]
