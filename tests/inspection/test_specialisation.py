"""Mutual information against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mepa_ds.inspection.specialisation import specialisation

LABELS = np.repeat(np.arange(4), 50)


def test_experts_that_tell_the_class() -> None:
    """A class's tokens all go to one expert of its own: log(number of classes), the most that there can be."""
    found = specialisation(10.0 * np.eye(4)[LABELS], LABELS)
    assert found.mutual_information == pytest.approx(math.log(4), rel=1e-12)
    assert found.share == pytest.approx(1, abs=1e-9)
    assert found.p_value == pytest.approx(1 / 201)


def test_two_experts_for_each_token() -> None:
    """Eight experts, a pair of them for each class: the pairs tell the class."""
    found = specialisation(np.eye(4)[LABELS].repeat(2, axis=1), LABELS, num_choices=2)
    assert found.mutual_information == pytest.approx(math.log(4), rel=1e-12)
    assert found.share == pytest.approx(1, abs=1e-9)
    few = specialisation(np.eye(2)[LABELS % 2].repeat(2, axis=1), LABELS, num_choices=2)
    assert few.mutual_information == pytest.approx(math.log(2), rel=1e-12)
    assert few.share == pytest.approx(1, abs=1e-9), "two pairs of experts cannot tell four classes apart"


def test_experts_that_do_not_know_the_class() -> None:
    """Few tokens make any expert look special: the plug-in estimate is not 0, the corrected one is about 0."""
    rng = np.random.default_rng(0)
    found = [specialisation(rng.multinomial(4, np.full(8, 1 / 8), len(LABELS)), LABELS) for _ in range(8)]
    bias = (4 - 1) * (8 - 1) / (2 * 4 * len(LABELS))  # Miller and Madow's, for independent tokens
    assert np.mean([f.chance for f in found]) == pytest.approx(bias, rel=0.15)
    assert abs(np.mean([f.corrected for f in found])) < bias / 2
    assert np.mean([f.p_value for f in found]) > 0.1


def test_tokens_of_an_image_are_not_independent() -> None:
    """Images that keep to one expert, whatever their class: a correction that counts tokens would see specialists."""
    rng = np.random.default_rng(1)
    found = specialisation(100.0 * np.eye(8)[rng.integers(0, 8, len(LABELS))], LABELS)
    assert found.mutual_information > 0.03
    assert found.corrected == pytest.approx(0, abs=0.03)
    assert found.p_value > 0.02
