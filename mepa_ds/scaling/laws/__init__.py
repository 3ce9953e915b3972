"""The laws that losses follow, fitted to runs: NumPy arrays in, frozen results out; neither torch nor DeepSpeed."""

from mepa_ds.scaling.laws.chinchilla import ChinchillaFit, Optimum, fit_chinchilla
from mepa_ds.scaling.laws.data_constrained import DataConstrainedFit, fit_data_constrained
from mepa_ds.scaling.laws.fitting.checks import MAX_CORRELATION, collinearity
from mepa_ds.scaling.laws.fitting.options import FitOptions
from mepa_ds.scaling.laws.fitting.result import Fit
from mepa_ds.scaling.laws.hold_out import HeldOut, hold_out, noise_floor, rolling
from mepa_ds.scaling.laws.isoflop import IsoflopFit, fit_isoflop
from mepa_ds.scaling.laws.learning_rate import LrDataFit, LrFit, fit_lr
from mepa_ds.scaling.laws.link import LinkFit, fit_link
from mepa_ds.scaling.laws.moe import fit_fine_grained_moe, fit_joint_moe, fit_routed
from mepa_ds.scaling.laws.moe_laws import FineGrainedMoEFit, JointMoEFit, RoutedFit, effective_experts
from mepa_ds.scaling.laws.power import PowerFit, fit_power
from mepa_ds.scaling.laws.scales import ScalesFit, fit_scales

FITS: dict[str, type[Fit]] = {
    kind.law: kind
    for kind in (
        PowerFit,
        ChinchillaFit,
        DataConstrainedFit,
        IsoflopFit,
        RoutedFit,
        JointMoEFit,
        FineGrainedMoEFit,
        ScalesFit,
        LrFit,
        LrDataFit,
        LinkFit,
    )
}
"""What the fit of each law is, by the law's name."""

__all__ = [
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
]
