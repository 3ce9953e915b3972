"""The laws that losses follow, fitted to runs: NumPy arrays in, frozen results out. Needs neither torch nor DeepSpeed."""

from mepa_ds.scaling.laws.chinchilla import ChinchillaFit, Optimum, fit_chinchilla
from mepa_ds.scaling.laws.fitting.checks import MAX_CORRELATION, collinearity
from mepa_ds.scaling.laws.fitting.options import FitOptions
from mepa_ds.scaling.laws.fitting.result import Fit
from mepa_ds.scaling.laws.power import PowerFit, fit_power

__all__ = [
    "MAX_CORRELATION",
    "ChinchillaFit",
    "Fit",
    "FitOptions",
    "Optimum",
    "PowerFit",
    "collinearity",
    "fit_chinchilla",
    "fit_power",
]
