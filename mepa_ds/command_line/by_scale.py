"""Options that take one number for all scales, or one for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from mepa_ds.command_line.paths import finite


def _by_scale(kind: str, parse: Callable[[str], Any]) -> PrimitiveConstructorSpec[tuple[Any, ...]]:
    def parse_all(words: list[str]) -> tuple[Any, ...]:
        if not words:
            raise ValueError("expected a number, or one for each scale")
        return tuple(map(parse, words))

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{kind} [{kind} ...]",
        instance_from_str=parse_all,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: list(map(str, value)),
    )


Numbers = Annotated[tuple[float, ...], _by_scale("FLOAT", finite)]
Counts = Annotated[tuple[int, ...], _by_scale("INT", int)]
