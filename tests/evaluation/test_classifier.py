"""The classifier of the user's own images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mepa_ds.errors import UserError
from mepa_ds.evaluation import classifier as module
from mepa_ds.evaluation.classifier import Classifier, ClassifierSpace
from tests.evaluation.images import digits, labels


def small(first: int, count: int) -> NDArray[np.uint8]:
    """(count, 8, 8, 3)"""
    return np.ascontiguousarray(digits(first, count)[:, ::4, ::4])


def fit(count: int) -> Classifier:
    return Classifier.fit((small(0, count), labels(0, count)), (small(1500, 100), labels(1500, 100)), 10)


def test_it_learns_and_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same again, to the bit, and from its directory."""
    monkeypatch.setattr(module, "_BATCH", 32)
    monkeypatch.setattr(module, "_EPOCHS", (1, 1))
    assert fit(100).identity == fit(100).identity
    monkeypatch.setattr(module, "_EPOCHS", (5, 5))
    fitted = fit(600)
    assert fitted.heldout_accuracy > 0.8
    fitted.save(tmp_path / "classifier")
    loaded = Classifier.load(tmp_path / "classifier")
    assert (loaded.identity, loaded.config) == (fitted.identity, fitted.config)
    pixels = small(1500, 100)
    probs_NC = loaded.probs(pixels)
    torch.testing.assert_close(probs_NC.sum(1), torch.ones(100))
    assert float((probs_NC.argmax(1).numpy() == labels(1500, 100)).mean()) == fitted.heldout_accuracy
    rows_ND = loaded.features(pixels)
    assert rows_ND.shape == (100, ClassifierSpace(loaded).width)
    alone = torch.cat([loaded.features(pixels[first : first + 7]) for first in range(0, 100, 7)])
    assert torch.equal(rows_ND, alone), "whatever else is in the batch"
    enlarged_NC = loaded.probs(pixels.repeat(2, 1).repeat(2, 2))
    assert (enlarged_NC.argmax(1) == probs_NC.argmax(1)).float().mean() > 0.8, "resized to its own side"


def test_what_cannot_teach_is_refused(tmp_path: Path) -> None:
    good = (digits(0, 20), labels(0, 20))
    cases = [
        ((good[0], np.full(20, -1)), "training images: labels from -1 to -1, expected 0..9"),
        ((good[0], labels(0, 19)), "20 images with 19 labels"),
        ((good[0], np.zeros(20, np.int64)), r"ours: 9 of 10 classes have no images \(class 1 is the first\)"),
    ]
    for images, message in cases:
        with pytest.raises(UserError, match=message):
            Classifier.fit(images, good, 10, trained_on="ours")
    with pytest.raises(UserError, match=r"no config.json here"):
        Classifier.load(tmp_path)
