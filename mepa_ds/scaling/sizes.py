"""Names of model sizes in studies.

d16 is VAR's size (C = 64 x 16, 16 heads), d4w128 has the width 128, and d4w128h8 has 8 heads as well.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator

from mepa_ds.config.model import preset_values

_SIZE = re.compile(r"d(?P<depth>[1-9]\d*)(?:w(?P<width>[1-9]\d*))?(?:h(?P<heads>[1-9]\d*))?")
VAR_HEAD_WIDTH = 64
_DEEPEST = 1000


def _checked(name: str) -> str:
    if _SIZE.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} is no size; write d<depth>, d<depth>w<width> or d<depth>w<width>h<heads>, such as d16 or d4w128"
        )
    return name


SizeName = Annotated[str, AfterValidator(_checked)]


def is_of_ladder(name: str) -> bool:
    """Whether a size is one of VAR's, whose width follows from the depth."""
    return "w" not in name


def ladder_values(name: str) -> dict[str, Any]:
    """Returns what else VAR's ladder sets for a size of it, as keys of a recipe's model; nothing for other sizes."""
    if not is_of_ladder(name):
        return {}
    return {"adaln_gamma_init": preset_values(f"var-d{size_values(name)['depth']}")["adaln_gamma_init"]}


def size_values(name: str, head_width: int = VAR_HEAD_WIDTH) -> dict[str, Any]:
    """Returns depth, width and num_heads of a size, as keys of a recipe's model.

    Without w the width is 64 x depth (VAR); without h the heads are width / `head_width`, and at least one.

    Raises:
        ValueError: the name is none, or the width is no multiple of the heads.
    """
    match = _SIZE.fullmatch(_checked(name))
    assert match is not None
    if head_width < 1:
        raise ValueError(f"head width {head_width}: expected at least 1")
    depth = int(match["depth"])
    if depth > _DEEPEST:
        raise ValueError(f"{name}: expected a depth of at most {_DEEPEST}")
    width = int(match["width"] or VAR_HEAD_WIDTH * depth)
    if match["heads"]:
        heads = int(match["heads"])
    elif match["width"] is None:
        heads = depth
    else:
        heads = max(width // head_width, 1)
    unit = heads if match["heads"] or match["width"] is None else head_width
    if width % unit:
        raise ValueError(
            f"{name}: the width {width} is no multiple of {unit}; give the number of heads, as "
            f"{name.split('h')[0]}h<heads>, or another head_width"
        )
    return {"depth": depth, "width": width, "num_heads": heads}
