"""The option `--scales`, alike in every command."""

from __future__ import annotations

from typing import Annotated

import tyro

from mepa_ds.scales import parse_sides

Scales = Annotated[
    tuple[int, ...] | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="1 2 3 ...",
        instance_from_str=parse_sides,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["None"] if value is None else [str(side) for side in value],
    ),
]
"""Sides of the token maps, as `1 2 3 4` or `1,2,3,4`; None: not given."""
