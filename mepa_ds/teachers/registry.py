"""Teachers by name. A new teacher is a file with a subclass of `Teacher` and a line in TEACHERS, or, for a ViT of timm,
a line in TIMM_NAMES (known_vits.py). Its features must then be precomputed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mepa_ds.errors import UserError
from mepa_ds.teachers import patch_pca
from mepa_ds.teachers.base import Teacher
from mepa_ds.teachers.conv_net import KINDS, ConvNetConfig, ConvTeacher, Kind
from mepa_ds.teachers.known_vits import TIMM_NAMES
from mepa_ds.teachers.patch_pca import PatchPca, PatchPcaConfig
from mepa_ds.teachers.timm_vit import TimmVit

Loader = Callable[[str, str | Path | None, int | None], Teacher]
"""(name, weights, grid side or None for the teacher's own) -> frozen teacher."""


def _fitted(load: Callable[[Path, str], Teacher]) -> Loader:
    """A teacher that `fit-teacher` made: its directory is needed, and has the grid."""

    def loader(name: str, weights: str | Path | None, grid_side: int | None) -> Teacher:
        if weights is None:
            raise UserError(f"teacher {name!r} needs weights: the directory that `fit-teacher {name}` wrote")
        teacher = load(Path(weights), name)
        if grid_side not in (None, teacher.grid_side):
            raise UserError(f"{weights}: fitted for a grid of side {teacher.grid_side}, not {grid_side}; fit it again")
        return teacher

    return loader


def _conv(kind: Kind) -> Loader:
    return _fitted(lambda directory, name: ConvTeacher.load(kind, directory, name))


def _timm(model_name: str) -> Loader:
    return lambda name, weights, grid_side: TimmVit.load(name, model_name, weights, grid_side)


FITTED: dict[str, Callable[[], Teacher]] = {
    patch_pca.KIND: lambda: PatchPca(PatchPcaConfig()),
    **{kind: partial(ConvTeacher, kind, ConvNetConfig()) for kind in KINDS},
}
"""Teachers that `fit-teacher` makes -> one of the default size, without weights."""

TEACHERS: dict[str, Loader] = {
    patch_pca.KIND: _fitted(PatchPca.load),
    **{kind: _conv(kind) for kind in KINDS},
    **{name: _timm(model_name) for name, model_name in TIMM_NAMES.items()},
}
"""Teachers that have a name here. Every other plain ViT is called by its name in timm, with or without a tag."""


def build_teacher(name: str, weights: str | Path | None, grid_side: int | None = None) -> Teacher:
    """The frozen teacher of that name.

    Args:
        name: a key of TEACHERS, or a ViT's name in timm.
        weights: a local checkpoint; `hub` lets timm download it (the only way to touch the network).
        grid_side: features along one side; None is the teacher's own (16 for ViTs).

    Raises:
        UserError: the name is unknown (the message has the nearest known names), or the weights are missing or unfit.
    """
    if name in TEACHERS:
        return TEACHERS[name](name, weights, grid_side)
    import timm

    if timm.is_model(name):
        return TimmVit.load(name, name, weights, grid_side)
    near = difflib.get_close_matches(name, [*TEACHERS, *timm.list_models("*vit*")], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(TEACHERS)}"
    raise UserError(f"teacher {name!r} is unknown; {hint} (or any plain ViT by its name in timm)")
