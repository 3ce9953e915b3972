"""Scaling studies: many runs of different sizes, planned together, and the laws that their losses follow.

The public names below are imported on first use: `import mepa_ds.scaling` needs neither torch nor SciPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mepa_ds.scaling.fit_files import exponents_by_count as exponents_by_count
    from mepa_ds.scaling.fit_files import fit_file as fit_file
    from mepa_ds.scaling.fit_files import read_fits as read_fits
    from mepa_ds.scaling.fit_files import write_fits as write_fits
    from mepa_ds.scaling.fits import TableFit as TableFit
    from mepa_ds.scaling.fits import fit_table as fit_table
    from mepa_ds.scaling.fits import hold_out_table as hold_out_table
    from mepa_ds.scaling.fits import read_fit as read_fit
    from mepa_ds.scaling.fits import rolling_table as rolling_table
    from mepa_ds.scaling.laws import FITS as FITS
    from mepa_ds.scaling.laws import MAX_CORRELATION as MAX_CORRELATION
    from mepa_ds.scaling.laws import ChinchillaFit as ChinchillaFit
    from mepa_ds.scaling.laws import DataConstrainedFit as DataConstrainedFit
    from mepa_ds.scaling.laws import FineGrainedMoEFit as FineGrainedMoEFit
    from mepa_ds.scaling.laws import Fit as Fit
    from mepa_ds.scaling.laws import FitOptions as FitOptions
    from mepa_ds.scaling.laws import HeldOut as HeldOut
    from mepa_ds.scaling.laws import IsoflopFit as IsoflopFit
    from mepa_ds.scaling.laws import JointMoEFit as JointMoEFit
    from mepa_ds.scaling.laws import LinkFit as LinkFit
    from mepa_ds.scaling.laws import LrDataFit as LrDataFit
    from mepa_ds.scaling.laws import LrFit as LrFit
    from mepa_ds.scaling.laws import Optimum as Optimum
    from mepa_ds.scaling.laws import PowerFit as PowerFit
    from mepa_ds.scaling.laws import RoutedFit as RoutedFit
    from mepa_ds.scaling.laws import ScalesFit as ScalesFit
    from mepa_ds.scaling.laws import collinearity as collinearity
    from mepa_ds.scaling.laws import effective_experts as effective_experts
    from mepa_ds.scaling.laws import fit_chinchilla as fit_chinchilla
    from mepa_ds.scaling.laws import fit_data_constrained as fit_data_constrained
    from mepa_ds.scaling.laws import fit_fine_grained_moe as fit_fine_grained_moe
    from mepa_ds.scaling.laws import fit_isoflop as fit_isoflop
    from mepa_ds.scaling.laws import fit_joint_moe as fit_joint_moe
    from mepa_ds.scaling.laws import fit_link as fit_link
    from mepa_ds.scaling.laws import fit_lr as fit_lr
    from mepa_ds.scaling.laws import fit_power as fit_power
    from mepa_ds.scaling.laws import fit_routed as fit_routed
    from mepa_ds.scaling.laws import fit_scales as fit_scales
    from mepa_ds.scaling.laws import hold_out as hold_out
    from mepa_ds.scaling.laws import noise_floor as noise_floor
    from mepa_ds.scaling.laws import rolling as rolling
    from mepa_ds.scaling.table import choose_rows as choose_rows
    from mepa_ds.scaling.table import read_table as read_table

_LAWS = (
    "FITS",
    "MAX_CORRELATION",
    "ChinchillaFit",
    "DataConstrainedFit",
    "FineGrainedMoEFit",
    "Fit",
    "FitOptions",
    "HeldOut",
    "IsoflopFit",
    "JointMoEFit",
    "LinkFit",
    "LrDataFit",
    "LrFit",
    "Optimum",
    "PowerFit",
    "RoutedFit",
    "ScalesFit",
    "collinearity",
    "effective_experts",
    "fit_chinchilla",
    "fit_data_constrained",
    "fit_fine_grained_moe",
    "fit_isoflop",
    "fit_joint_moe",
    "fit_link",
    "fit_lr",
    "fit_power",
    "fit_routed",
    "fit_scales",
    "hold_out",
    "noise_floor",
    "rolling",
)
_PUBLIC = dict.fromkeys(_LAWS, "mepa_ds.scaling.laws") | {
    "TableFit": "mepa_ds.scaling.fits",
    "choose_rows": "mepa_ds.scaling.table",
    "exponents_by_count": "mepa_ds.scaling.fit_files",
    "fit_file": "mepa_ds.scaling.fit_files",
    "fit_table": "mepa_ds.scaling.fits",
    "hold_out_table": "mepa_ds.scaling.fits",
    "read_fit": "mepa_ds.scaling.fits",
    "read_fits": "mepa_ds.scaling.fit_files",
    "read_table": "mepa_ds.scaling.table",
    "rolling_table": "mepa_ds.scaling.fits",
    "write_fits": "mepa_ds.scaling.fit_files",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mepa_ds.scaling' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
