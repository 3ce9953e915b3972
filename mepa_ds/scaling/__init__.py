"""Scaling studies: many runs of different sizes, planned together, and the laws that their losses follow.

The public names below are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mepa_ds.scaling.laws import ChinchillaFit as ChinchillaFit
    from mepa_ds.scaling.laws import Fit as Fit
    from mepa_ds.scaling.laws import FitOptions as FitOptions
    from mepa_ds.scaling.laws import Optimum as Optimum
    from mepa_ds.scaling.laws import PowerFit as PowerFit
    from mepa_ds.scaling.laws import collinearity as collinearity
    from mepa_ds.scaling.laws import fit_chinchilla as fit_chinchilla
    from mepa_ds.scaling.laws import fit_power as fit_power

_LAWS = "mepa_ds.scaling.laws"
_PUBLIC = {
    name: _LAWS
    for name in (
        "ChinchillaFit",
        "Fit",
        "FitOptions",
        "Optimum",
        "PowerFit",
        "collinearity",
        "fit_chinchilla",
        "fit_power",
    )
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mepa_ds.scaling' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
