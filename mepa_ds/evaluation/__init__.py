"""Scores of images: formulas, feature spaces, references, and what compares two sets of images with them."""

from mepa_ds.evaluation.formulas import (
    Gaussian,
    density_coverage,
    fd_infinity,
    frechet_distance,
    inception_score,
    kid,
    precision_recall,
)

__all__ = [
    "Gaussian",
    "density_coverage",
    "fd_infinity",
    "frechet_distance",
    "inception_score",
    "kid",
    "precision_recall",
]
