"""Precision, recall, density and coverage are those of double loops, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.evaluation.formulas import neighbours
from mepa_ds.evaluation.formulas.manifold import density_coverage, manifold, precision_recall
from mepa_ds.evaluation.formulas.neighbours import nearest_distances


def naive(real_MD: Tensor, fake_ND: Tensor, k: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Kynkaanniemi et al. (arXiv 1904.06991), Naeem et al. (2002.09797), by double loops in float64."""
    real, fake = real_MD.double(), fake_ND.double()

    def square(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().sum())

    def radii(points: Tensor) -> list[float]:
        return [
            sorted(square(point, other) for number, other in enumerate(points) if number != own)[k - 1]
            for own, point in enumerate(points)
        ]

    of_real, of_fake = radii(real), radii(fake)
    distances = [[square(sample, image) for image in real] for sample in fake]
    in_real = [[d <= radius for d, radius in zip(row, of_real, strict=True)] for row in distances]
    in_fake = [
        [row[image] <= radius for row, radius in zip(distances, of_fake, strict=True)] for image in range(len(real))
    ]
    covered = [any(row[image] for row in in_real) for image in range(len(real))]
    return (
        (sum(map(any, in_real)) / len(fake), sum(map(any, in_fake)) / len(real)),
        (sum(map(sum, in_real)) / k / len(fake), sum(covered) / len(real)),
    )  # fmt: skip


def sets() -> dict[str, tuple[Tensor, Tensor]]:
    """(real, generated) of kinds on which rounded distances would fail."""
    torch.manual_seed(0)
    spread = torch.randn(30, 6)
    return {
        "of unlike spread and size": (spread, 0.7 * torch.randn(40, 6) + 0.5),
        "many equal distances": (torch.randint(0, 3, (40, 4)).float(), torch.randint(0, 3, (35, 4)).float()),
        "equal images far from zero": (
            torch.cat([torch.full((4, 50), 33.3), 1000 + torch.randn(20, 50)]), 1000 + torch.randn(30, 50)
        ),
        "close together": (1e4 + 1e-3 * torch.randn(40, 5), 1e4 + 1e-3 * torch.randn(40, 5)),
        "closer than fp32 tells": (1e8 + torch.randn(30, 30).double(), 1e8 + torch.randn(30, 30).double()),
        "all equal": (torch.ones(12, 7), torch.ones(12, 7)),
        "copies of the reference": (spread, spread[:20]),
        "huge": (1e30 * torch.randn(20, 7), 1e30 * torch.randn(20, 7)),
        "two far clusters": (
            torch.cat([torch.randn(20, 4), 1e7 + torch.randn(20, 4)]),
            torch.cat([torch.randn(20, 4), 1e7 + torch.randn(20, 4)]),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", sets())
def test_scores_are_those_of_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, and with few candidates for the neighbours."""
    real_MD, fake_ND = sets()[name]
    for k in (3, 5):
        expected = naive(real_MD, fake_ND, k)
        for pairs, candidates in ((1 << 25, 6), (100, 1)):
            monkeypatch.setattr(neighbours, "_PAIRS", pairs)
            monkeypatch.setattr(neighbours, "_CANDIDATES", candidates)
            assert precision_recall(real_MD, fake_ND, k) == pytest.approx(expected[0], rel=1e-15)
            assert density_coverage(real_MD, fake_ND, k) == pytest.approx(expected[1], rel=1e-14)


def test_a_collapsed_model_is_precise_and_recalls_nothing() -> None:
    torch.manual_seed(0)
    precision, recall = precision_recall(torch.randn(60, 6).numpy(), 0.1 * torch.randn(60, 6).numpy())
    assert precision > 0.9
    assert recall < 0.2


def test_means_are_over_images() -> None:
    torch.manual_seed(0)
    real_MD, fake_ND = torch.randn(50, 4), torch.randn(30, 4)
    found = manifold(real_MD, fake_ND)
    assert (float(found.precision_M.mean()), float(found.recall_N.mean())) == precision_recall(real_MD, fake_ND)
    assert (float(found.density_M.mean()), float(found.coverage_N.mean())) == density_coverage(real_MD, fake_ND)


def test_bad_input() -> None:
    good = torch.randn(9, 3)
    broken = good.clone()
    broken[4, 1] = float("nan")
    for reference, samples, message in (
        (good, good[:3], "samples: 3 images, but this score needs at least 4"),
        (good[:2], good, "reference: 2 images"),
        (good, good[:, :2], "reference and samples: 3 and 2 features an image"),
        (broken, good, "reference: image 4 has features that are not finite"),
        (good, good[0], r"samples: expected features of shape \(images, width\), got \(3,\)"),
        (good, good.to(torch.complex64), "samples: expected an array or a tensor of numbers"),
    ):
        with pytest.raises(UserError, match=message):
            precision_recall(reference, samples)


def test_numbers_are_those_of_torch_fidelity() -> None:
    """Of the version whose order of arguments is known: generated, then real."""
    package = pytest.importorskip("torch_fidelity")
    if package.__version__ != "0.4.0":
        pytest.skip("another version of torch-fidelity has another order of arguments")
    from torch_fidelity.metric_prc import prc_features_to_metric

    torch.manual_seed(1)
    samples_ND, real_MD = torch.randn(90, 5), 1.3 * torch.randn(70, 5)
    theirs = prc_features_to_metric(
        samples_ND, real_MD, prc_neighborhood=3, prc_batch_size=30, save_cpu_ram=True, verbose=False
    )
    assert theirs["precision"] > theirs["recall"]
    assert precision_recall(real_MD, samples_ND) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_nearest_distances() -> None:
    torch.manual_seed(0)
    points_ND, centres_MD = torch.randn(30, 6).double(), torch.randn(40, 6).double()
    centres_MD[7] = points_ND[3]
    expected = torch.cdist(points_ND, centres_MD, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    found = nearest_distances(points_ND, centres_MD)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found[3] == 0
