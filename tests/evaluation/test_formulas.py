"""The formulas of the scores against loops, closed forms and torch-fidelity's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mepa_ds.errors import UserError
from mepa_ds.evaluation import formulas as score_formulas
from mepa_ds.evaluation.formulas import (
    SPLIT,
    Gaussian,
    frechet_distance,
    inception_scores,
    is_covariance,
    precision_and_recall,
)


def gaussians(size: int) -> tuple[Gaussian, Gaussian]:
    """Of features that overlap, whose covariances do not commute."""
    rng = np.random.default_rng(0)
    first_ND, second_ND = rng.normal(size=(2, 3 * size, size))
    return Gaussian.of(torch.from_numpy(first_ND)), Gaussian.of(torch.from_numpy(second_ND * rng.uniform(0.5, 2, size)))


def frechet_by_the_product(first: Gaussian, second: Gaussian) -> float:
    """By eigenvalues of the product, which is not symmetric."""
    cross = np.sqrt(np.linalg.eigvals(first.covariance @ second.covariance).astype(complex)).real.sum()
    difference = first.mean - second.mean
    return float(difference @ difference + np.trace(first.covariance + second.covariance) - 2 * cross)


def test_frechet_distance_is_that_of_two_gaussians() -> None:
    """|m1 - m2|^2 + sum of squared differences of standard deviations, where covariances commute."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    deviations = rng.uniform(0.1, 2, (2, 6))
    means = rng.normal(size=(2, 6))
    first, second = (
        Gaussian(mean, turn @ np.diag(deviation**2) @ turn.T) for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    first, second = gaussians(7)
    assert frechet_distance(first, second) == pytest.approx(frechet_by_the_product(first, second), rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second), rel=1e-9)


def test_statistics_are_numpys_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    features_ND = torch.randn(23, 5) + 100
    monkeypatch.setattr(score_formulas, "_ROWS", 4)
    found = Gaussian.of(features_ND)
    np.testing.assert_allclose(found.mean, features_ND.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features_ND.double().numpy(), rowvar=False), rtol=1e-9)
    with pytest.raises(UserError, match="statistics of 1 images: at least 2"):
        Gaussian.of(features_ND[:1])


def test_fewer_images_than_features_have_a_distance() -> None:
    """Their covariances are singular."""
    first, second = (Gaussian.of(torch.randn(4, 9)) for _ in range(2))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, second) > 0.1


def test_what_is_no_covariance() -> None:
    good = gaussians(6)[0].covariance
    assert is_covariance(good)
    assert is_covariance(good.astype(np.float32).astype(np.float64))
    assert is_covariance(np.zeros((3, 3)))
    assert is_covariance(np.ones((3, 3)))
    negative = np.diag([1.0, 1.0, -0.1])
    for bad in (good + np.eye(6)[::-1].cumsum(0), negative, -np.eye(3)):
        assert not is_covariance(bad)
    with pytest.raises(UserError, match=r"the negative eigenvalue -0\.1"):
        frechet_distance(Gaussian(np.zeros(3), negative), Gaussian(np.zeros(3), np.eye(3)))


def naive_precision_and_recall(samples_NP: torch.Tensor, real_NP: torch.Tensor) -> tuple[float, float]:
    """Kynkaanniemi et al. (arXiv 1904.06991), by double loops: who lies in the third-neighbour ball of another set."""

    def covered(points: torch.Tensor, centres: torch.Tensor) -> float:
        hits = 0
        for point in points:
            for number, centre in enumerate(centres):
                others = torch.cat([centres[:number], centres[number + 1 :]])
                radius = (others - centre).norm(dim=1).sort().values[2]
                if (point - centre).norm() <= radius:
                    hits += 1
                    break
        return hits / len(points)

    return covered(samples_NP, real_NP), covered(real_NP, samples_NP)


@pytest.mark.parametrize("rows", [7, 1000])
def test_precision_and_recall_are_those_of_loops(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Sets of unlike spread and size, so that no exchange of the two goes unseen, in pieces and whole."""
    monkeypatch.setattr(score_formulas, "_ROWS", rows)
    torch.manual_seed(0)
    real_MD, samples_ND = torch.randn(30, 6), 0.7 * torch.randn(40, 6) + 0.5
    expected = naive_precision_and_recall(samples_ND, real_MD)
    assert 0 < expected[1] < expected[0] < 1
    assert precision_and_recall(samples_ND, real_MD) == pytest.approx(expected)


def test_a_collapsed_model_is_precise_and_recalls_nothing() -> None:
    torch.manual_seed(0)
    precision, recall = precision_and_recall(0.1 * torch.randn(60, 6), torch.randn(60, 6))
    assert precision > 0.9
    assert recall < 0.2


def test_equal_images_are_in_each_others_balls() -> None:
    """Four equal images have balls of radius 0, in which copies of them lie, however large their features."""
    real_MD = torch.cat([torch.full((4, 50), 33.3), 1000 + torch.randn(5, 50)])
    assert precision_and_recall(real_MD[:4], real_MD) == (1.0, 4 / 9)
    with pytest.raises(UserError, match="3 samples, but neighbours are looked for among at least 4"):
        precision_and_recall(real_MD[:3], real_MD)
    with pytest.raises(UserError, match="2 real images"):
        precision_and_recall(real_MD, real_MD[:2])


def test_splits_of_the_inception_score_are_5000_5000_and_the_rest() -> None:
    """By a plain loop in NumPy; 12 400 images are no three equal parts."""
    torch.manual_seed(0)
    logits_NK = 3 * torch.randn(12_400, 6)
    p_NK = torch.softmax(logits_NK.double(), 1).numpy()
    expected = []
    for start in range(0, 12_400, 5000):
        part = p_NK[start : start + 5000]
        expected.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert SPLIT == 5000
    assert len(expected) == 3
    assert inception_scores(logits_NK) == pytest.approx(expected, rel=1e-12)


def test_probabilities_that_underflow_add_nothing() -> None:
    logits_NK = torch.tensor([[0.0, 0.0, -2000.0], [0.0, -2000.0, -2000.0]])
    assert np.isfinite(inception_scores(logits_NK)).all()


def test_numbers_are_those_of_torch_fidelity() -> None:
    """Of the version whose order of arguments is known: generated, then real."""
    package = pytest.importorskip("torch_fidelity")
    if package.__version__ != "0.4.0":
        pytest.skip("another version of torch-fidelity has another order of arguments")
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    torch.manual_seed(1)
    samples_ND, real_MD = torch.randn(90, 5), 1.3 * torch.randn(70, 5)
    theirs = prc_features_to_metric(
        samples_ND, real_MD, prc_neighborhood=3, prc_batch_size=30, save_cpu_ram=True, verbose=False
    )
    assert theirs["precision"] > theirs["recall"]
    assert precision_and_recall(samples_ND, real_MD) == pytest.approx((theirs["precision"], theirs["recall"]))
    first, second = gaussians(8)
    given = ({"mu": gaussian.mean, "sigma": gaussian.covariance} for gaussian in (first, second))
    distance = fid_statistics_to_metric(*given, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(first, second) == pytest.approx(distance, rel=1e-9)
    logits_NK = torch.randn(300, 7)
    score = isc_features_to_metric(logits_NK, splits=1, shuffle=False)["inception_score_mean"]
    assert inception_scores(logits_NK) == pytest.approx([score])
