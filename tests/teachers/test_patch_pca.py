"""The patch-PCA teacher against a naive reference, its file, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mepa_ds.config.base import validate
from mepa_ds.errors import UserError
from mepa_ds.teachers.patch_pca import PatchPca, PatchPcaConfig
from mepa_ds.teachers.registry import build_teacher

CONFIG = PatchPcaConfig(grid_side=4, pixels_per_cell=4, window=8, width=12)


def images(count: int = 40, side: int = 16, seed: int = 0) -> Tensor:
    noise = torch.rand(count, 3, side // 2, side // 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(noise, size=(side, side), mode="bilinear")


def windows_by_hand(image_3HW: Tensor, cell: int, window: int) -> Tensor:
    """(N, 3 * window**2), one cell after another, mirrored at the border."""
    margin = (window - cell) // 2
    side = image_3HW.shape[-1]
    mirrored = [abs(i) if i < side else 2 * (side - 1) - i for i in range(-margin, side + margin)]
    padded = image_3HW[:, mirrored][:, :, mirrored]
    rows = []
    for top in range(0, side, cell):
        for left in range(0, side, cell):
            rows.append(padded[:, top : top + window, left : left + window].reshape(-1))
    return torch.stack(rows)


def test_features_against_svd_of_windows() -> None:
    batch = images()
    teacher = PatchPca.fit(batch.split(16), CONFIG)
    rows = torch.cat([windows_by_hand(image, 4, 8) for image in batch]).double()
    mean = rows.mean(0)
    _, singular, vectors = torch.linalg.svd(rows - mean, full_matrices=False)
    variances = singular**2 / len(rows)
    gains = (variances[:12] + CONFIG.whitening_floor * variances[0]).rsqrt()
    expected = (windows_by_hand(batch[3], 4, 8).double() - mean) @ vectors[:12].T * gains
    features = teacher.patch_features(batch[3:4])[0].double()
    assert features.shape == (16, 12)
    torch.testing.assert_close(features.abs(), expected.abs(), rtol=1e-3, atol=1e-4)  # signs are a convention


def test_same_images_give_the_same_weights() -> None:
    first, second = (PatchPca.fit(images().split(16), CONFIG) for _ in range(2))
    assert first.identity == second.identity
    assert first.identity != PatchPca.fit(images(seed=1).split(16), CONFIG).identity


def test_other_sizes_are_resized() -> None:
    teacher = PatchPca.fit(images().split(16), CONFIG)
    assert teacher.patch_features(images(2, side=32)).shape == (2, 16, 12)
    assert teacher.patch_features(images(2), grid=(4, 6)).shape == (2, 24, 12)


def test_file_round_trip(tmp_path: Path) -> None:
    teacher = PatchPca.fit(images().split(16), CONFIG)
    teacher.save(tmp_path / "teacher")
    loaded = build_teacher("patch-pca", tmp_path / "teacher")
    assert (loaded.identity, loaded.width, loaded.grid_side) == (teacher.identity, 12, 4)
    assert torch.equal(loaded.patch_features(images(2)), teacher.patch_features(images(2)))
    with pytest.raises(UserError, match="grid of side 4, not 8"):
        build_teacher("patch-pca", tmp_path / "teacher", grid_side=8)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fit-teacher patch-pca"):
        build_teacher("patch-pca", None)
    with pytest.raises(UserError, match=r"no config\.json"):
        build_teacher("patch-pca", tmp_path)


def test_too_few_images() -> None:
    with pytest.raises(UserError, match="12 components asked of 0 vectors"):
        PatchPca.fit([], CONFIG)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("window", 7, "even number of pixels"), ("window", 40, "larger than the image"), ("width", 193, "at most")],
)
def test_impossible_config(field: str, value: int, message: str) -> None:
    given = {"grid_side": 4, "pixels_per_cell": 4, "window": 8, "width": 12, field: value}
    with pytest.raises(UserError, match=message):
        validate(PatchPcaConfig, given, "config.json")
