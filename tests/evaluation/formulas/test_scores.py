"""The inception score and KID against loops in NumPy, and their errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mepa_ds.errors import UserError
from mepa_ds.evaluation.formulas import kernel
from mepa_ds.evaluation.formulas.inception_score import SPLIT, inception_score
from mepa_ds.evaluation.formulas.kernel import kid


def test_splits_of_the_inception_score_are_5000_5000_and_the_rest() -> None:
    """By a plain loop in NumPy; 12 400 images are no three equal parts."""
    torch.manual_seed(0)
    p_NK = torch.softmax((3 * torch.randn(12_400, 6)).double(), 1).numpy()
    expected = []
    for start in range(0, 12_400, 5000):
        part = p_NK[start : start + 5000]
        expected.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert SPLIT == 5000
    assert inception_score(p_NK) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-12)
    assert inception_score(p_NK, splits=[5000, 5000, 2400]) == inception_score(torch.from_numpy(p_NK))
    assert inception_score(p_NK[:5000]) == (pytest.approx(expected[0]), None)


def test_what_is_no_probability() -> None:
    half_NK = np.full((6, 2), 0.5)
    assert inception_score(np.eye(2).repeat(3, 0)).mean == pytest.approx(2)  # zeros add nothing
    with pytest.raises(UserError, match="add up to 1"):
        inception_score(3 * half_NK)
    with pytest.raises(UserError, match="add up to 1"):
        inception_score(half_NK + np.array([1, -1]))
    with pytest.raises(UserError, match=r"splits: \[5, 2\] do not add up to the 6 images"):
        inception_score(half_NK, [5, 2])
    with pytest.raises(UserError, match="image 0 has features that are not finite"):
        inception_score(half_NK * np.nan)


def test_the_inception_score_is_torch_fidelitys() -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits_NK = torch.randn(300, 7)
    score = isc_features_to_metric(logits_NK, splits=1, shuffle=False)["inception_score_mean"]
    assert inception_score(logits_NK.double().softmax(1)).mean == pytest.approx(score)


def naive_kid(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return float(xx + yy - 2 * np.mean([k(a, b) for a in x for b in y]))


def test_kid_is_that_of_loops_and_its_error_the_jackknifes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(13, 4)), 1.3 * rng.normal(size=(9, 4)) + 0.4
    whole = kid(x, y)
    monkeypatch.setattr(kernel, "_ROWS", 4)
    assert kid(x, y) == pytest.approx(whole, rel=1e-12)
    assert whole.value == pytest.approx(naive_kid(x, y), rel=1e-10)
    variance = 0.0
    for values in (
        [naive_kid(np.delete(x, i, 0), y) for i in range(13)],
        [naive_kid(x, np.delete(y, i, 0)) for i in range(9)],
    ):
        variance += (len(values) - 1) * float(np.var(values))
    assert whole.error == pytest.approx(variance**0.5, rel=1e-9)
    with pytest.raises(UserError, match="samples: 2 images, but this score needs at least 3"):
        kid(x, y[:2])
