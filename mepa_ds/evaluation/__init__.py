"""Scores of images: formulas, feature spaces, references, and what compares two sets of images with them."""

from mepa_ds.evaluation.formulas.extrapolation import fd_infinity
from mepa_ds.evaluation.formulas.gaussian import Gaussian, frechet_distance
from mepa_ds.evaluation.formulas.inception_score import inception_score
from mepa_ds.evaluation.formulas.kernel import kid
from mepa_ds.evaluation.formulas.manifold import density_coverage, precision_recall

__all__ = [
    "Gaussian",
    "density_coverage",
    "fd_infinity",
    "frechet_distance",
    "inception_score",
    "kid",
    "precision_recall",
]
