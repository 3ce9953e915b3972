"""Frechet distances against closed forms, other algorithms, torch-fidelity and repeated draws."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from mepa_ds.errors import UserError
from mepa_ds.evaluation.formulas import gaussian as module
from mepa_ds.evaluation.formulas.extrapolation import fd_infinity
from mepa_ds.evaluation.formulas.gaussian import (
    FrechetTo,
    Gaussian,
    RunningGaussian,
    covariance_fault,
    frechet_distance,
)


def gaussians(size: int, count: int | None = None) -> tuple[Gaussian, Gaussian]:
    """Of features that overlap, whose covariances do not commute."""
    rng = np.random.default_rng(0)
    first_ND, second_ND = rng.normal(size=(2, count or 3 * size, size))
    return Gaussian.of(first_ND), Gaussian.of(second_ND * rng.uniform(0.5, 2, size) + 0.3)


def distance(first: Gaussian, second: Gaussian) -> float:
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def by_scipy(first: Gaussian, second: Gaussian) -> float:
    """With the matrix square root of the product, as FID's first program has it."""
    root = scipy.linalg.sqrtm(first.covariance @ second.covariance)
    difference = first.mean - second.mean
    return float(difference @ difference + np.trace(first.covariance + second.covariance - 2 * root.real))


def of_few(first_ND: torch.Tensor, second_MD: torch.Tensor) -> float:
    """With C = A^T A of centred features, tr (C1 C2)^(1/2) is the sum of the singular values of A1 A2^T."""
    first_ND, second_MD = first_ND.double(), second_MD.double()
    rows = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (first_ND, second_MD)]
    traces = sum(float(row.square().sum()) for row in rows)
    cross = float(torch.linalg.svdvals(rows[0] @ rows[1].T).sum())
    return float((first_ND.mean(0) - second_MD.mean(0)).square().sum()) + traces - 2 * cross


def test_frechet_distance_is_that_of_two_gaussians() -> None:
    """|m1 - m2|^2 + sum of squared differences of standard deviations, where covariances commute."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    deviations, means = rng.uniform(0.1, 2, (2, 6)), rng.normal(size=(2, 6))
    first, second = (
        Gaussian(mean, turn @ np.diag(deviation**2) @ turn.T) for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert distance(first, first) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("size", [7, 60])
def test_frechet_distance_is_scipys(size: int) -> None:
    first, second = gaussians(size)
    assert distance(first, second) == pytest.approx(by_scipy(first, second), rel=1e-6)
    assert distance(second, first) == pytest.approx(distance(first, second), rel=1e-9)
    as_tensors = (torch.from_numpy(x).float() for g in (first, second) for x in (g.mean, g.covariance))
    assert frechet_distance(*as_tensors) == pytest.approx(distance(first, second), rel=1e-5)  # type: ignore[arg-type]


def test_singular_covariances_have_the_right_distance() -> None:
    """Of fewer images than features; and of features that are always zero, or equal."""
    torch.manual_seed(0)
    few_ND, others_MD = torch.randn(20, 60).double(), (2 * torch.randn(30, 60) + 0.1).double()
    many_MD = torch.randn(500, 60).double() + 0.5
    dead_MD = many_MD.clone()
    dead_MD[:, 10:30] = 0
    dead_MD[:, 40] = dead_MD[:, 39]
    for first, second in ((few_ND, others_MD), (few_ND, many_MD), (dead_MD, many_MD), (dead_MD, few_ND)):
        expected = of_few(first, second)
        assert distance(Gaussian.of(first), Gaussian.of(second)) == pytest.approx(expected, rel=1e-6)
        assert FrechetTo(Gaussian.of(second)).distance(first)[0] == pytest.approx(expected, rel=1e-6)
    assert distance(Gaussian.of(few_ND), Gaussian.of(few_ND)) == pytest.approx(0, abs=1e-5)
    constant = Gaussian.of(torch.ones(4, 3))
    assert distance(constant, constant) == 0


def test_statistics_are_numpys_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    features_ND = torch.randn(23, 5) + 100
    monkeypatch.setattr(module, "_ROWS", 4)
    running = RunningGaussian(5)
    for part_BD in features_ND.split(6):
        running.add(part_BD)
    for found in (Gaussian.of(features_ND), running.gaussian()):
        np.testing.assert_allclose(found.mean, features_ND.double().numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(features_ND.double().numpy(), rowvar=False), rtol=1e-9)
    with pytest.raises(UserError, match="statistics: 1 images, but this score needs at least 2"):
        Gaussian.of(features_ND[:1])
    with pytest.raises(UserError, match="statistics of 0 images"):
        RunningGaussian(5).gaussian()


def test_what_is_no_covariance() -> None:
    good = gaussians(6)[0].covariance
    zero = np.zeros((3, 3))
    for fine in (good, good.astype(np.float32).astype(np.float64), zero, np.ones((3, 3))):
        assert covariance_fault(fine) is None
    negative = np.diag([1.0, 1.0, -0.1])
    for bad in (good + np.eye(6)[::-1].cumsum(0), negative, -np.eye(3)):
        assert "is no covariance" in str(covariance_fault(bad))
    mean = np.zeros(3)
    cases: list[tuple[list[NDArray[np.float64]], str]] = [
        ([mean, negative, mean, zero], "sigma1 is no covariance .*damaged"),
        ([mean, zero, mean, np.full((3, 3), np.nan)], "sigma2 has values that are not finite"),
        ([mean, zero, np.array([0, np.inf, 0]), zero], "sigma2 has a mean that is not finite"),
        ([mean, zero, np.zeros(4), np.eye(4)], "of 3 and 4 features: of two feature spaces"),
        ([mean, np.eye(4), mean, zero], r"mu1 and sigma1: of shapes \(3,\) and \(4, 4\)"),
        ([mean, zero, mean, zero.astype(object)], "sigma2: of type object, expected numbers"),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            frechet_distance(*given)  # type: ignore[arg-type]


def test_numbers_are_those_of_torch_fidelity() -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    first, second = gaussians(8)
    given = ({"mu": gaussian.mean, "sigma": gaussian.covariance} for gaussian in (first, second))
    theirs = fid_statistics_to_metric(*given, verbose=False)["frechet_inception_distance"]
    assert distance(first, second) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(("count", "size"), [(300, 20), (40, 60)])
def test_errors_are_those_of_repeated_draws(count: int, size: int) -> None:
    """Within a factor: never smaller, and at most twice as large where there are fewer images than features."""
    torch.manual_seed(0)
    mix_DD = torch.randn(size, size)
    reference = FrechetTo(Gaussian.of(torch.randn(2000, size) @ mix_DD))
    other_DD = mix_DD + 0.3 * torch.randn(size, size)
    found = np.array([reference.distance(torch.randn(count, size) @ other_DD + 0.1) for _ in range(60)])
    ratio = found[:, 1].mean() / found[:, 0].std()
    assert 0.8 < ratio < 2
    assert found[:, 1].std() < 0.3 * found[:, 1].mean()


def test_infinity_takes_the_bias_away() -> None:
    """The same Gaussian twice has distance 0; of 160 images it seems far larger."""
    torch.manual_seed(0)
    mean, sigma = torch.zeros(20), torch.eye(20)
    seen, extrapolated = [], []
    for draw in range(20):
        samples_ND = torch.randn(400, 20)
        seen.append(FrechetTo(Gaussian(mean.double().numpy(), sigma.double().numpy())).distance(samples_ND)[0])
        extrapolated.append(fd_infinity(mean, sigma, samples_ND, seed=draw))
    assert np.mean(seen) > 0.25
    assert abs(np.mean(extrapolated)) < 0.02
    assert fd_infinity(mean, sigma, samples_ND, seed=3) == fd_infinity(mean, sigma, samples_ND.numpy(), seed=3)
    with pytest.raises(UserError, match=r"150 images of 20 features are too few .*; at least 160"):
        fd_infinity(mean, sigma, samples_ND[:150])
