"""Options that take one number for all scales, or one for each."""

from __future__ import annotations

from typing import Annotated

import tyro

from mepa_ds.command_line.paths import finite


def _numbers(words: list[str]) -> tuple[float, ...]:
    if not words:
        raise ValueError("expected a number, or one for each scale")
    return tuple(finite(word) for word in words)


def _counts(words: list[str]) -> tuple[int, ...]:
    if not words:
        raise ValueError("expected a whole number, or one for each scale")
    return tuple(int(word) for word in words)


Numbers = Annotated[
    tuple[float, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="FLOAT [FLOAT ...]",
        instance_from_str=_numbers,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [str(number) for number in value],
    ),
]
Counts = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT [INT ...]",
        instance_from_str=_counts,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [str(number) for number in value],
    ),
]
