"""Types of options: paths, since no shell expands the ~ of `--out=~/x`, and numbers, which must be finite."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Annotated

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mepa_ds.config.paths import expand_path
from mepa_ds.config.values import HUB
from mepa_ds.errors import UserError

REGISTRY = ConstructorRegistry()
"""While it is active (`entry.run` sees to that), tyro reads options of type Path and float by these rules."""


@REGISTRY.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: expand_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


@REGISTRY.primitive_rule
def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
    if info.type is not float:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda words: finite(words[0]),
        is_instance=lambda value: isinstance(value, (int, float)),
        str_from_instance=lambda number: [str(number)],
    )


def finite(text: str) -> float:
    """Raises ValueError for what is no finite number."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"expected a finite number, got {text}")
    return number


def path_argument(text: str) -> Path:
    """The type of a path for argparse."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _path_or_name(words: list[str]) -> str:
    text = words[0]
    return text if text == HUB or ":" in text.partition("/")[0] else str(expand_path(text))


PathOrName = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=_path_or_name,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda text: [text],
    ),
]
"""The type of an option for a path, a pattern of paths, or something else: a URL (`https:`, `pipe:`), `hub`."""


def check_one_of(run: Path | None, weights: Path | None) -> None:
    """Raises UserError unless one of the options --run and --weights is given."""
    if (run is None) == (weights is None):
        raise UserError("give one of --run (a run, whose best weights are taken) and --weights (a directory or file)")
