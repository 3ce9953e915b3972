"""Small teachers trained on the images: features, losses, augmentation, files, and bad input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mepa_ds.config.base import validate
from mepa_ds.errors import UserError
from mepa_ds.random_streams import generator
from mepa_ds.teachers.conv_fitting import augmented, fit_conv_teacher
from mepa_ds.teachers.conv_net import KINDS, ConvNetConfig, ConvTeacher, Kind, nt_xent
from mepa_ds.teachers.registry import build_teacher

CONFIG = ConvNetConfig(grid_side=4, pixels_per_cell=4, width=16, steps=12, batch=16)
CPU = torch.device("cpu")


def stripes(count: int = 96) -> tuple[Tensor, Tensor]:
    """Bright stripes that lie or stand, at random phases, and which of the two: uint8 (N, 3, 16, 16) and (N,)."""
    torch.manual_seed(0)
    labels_N = torch.arange(count) % 2
    along = torch.arange(16)
    phases_N1 = torch.randint(4, (count, 1))
    wave_NS = ((along + phases_N1) // 2 % 2 * 200).to(torch.uint8)
    lying = wave_NS[:, None, :, None].expand(-1, 3, -1, 16)
    standing = wave_NS[:, None, None, :].expand(-1, 3, 16, -1)
    return torch.where(labels_N.bool()[:, None, None, None], standing, lying).contiguous(), labels_N


def fit(kind: Kind, config: ConvNetConfig = CONFIG) -> ConvTeacher:
    pixels, labels = stripes()
    return fit_conv_teacher(kind, pixels, labels if kind == "supervised" else None, config, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_features_have_mean_0_and_tell_classes_apart(kind: Kind) -> None:
    """Trained briefly, the means of the two classes lie further apart than images of one class do."""
    pixels, labels = stripes()
    teacher = fit(kind, CONFIG.model_copy(update={"steps": 40}))
    patches_BNC, cls_BC = teacher.features(pixels.float() / 127.5 - 1)
    assert cls_BC is not None
    assert patches_BNC.shape == (96, 16, 16)
    torch.testing.assert_close(cls_BC, patches_BNC.mean(1), rtol=1e-5, atol=1e-5)
    assert patches_BNC.mean().abs() < 0.5
    assert 0.3 < patches_BNC.std() < 3
    lying_C, standing_C = cls_BC[labels == 0].mean(0), cls_BC[labels == 1].mean(0)
    within = cls_BC[labels == 0].std(0).norm()
    assert (lying_C - standing_C).norm() > within


def test_same_images_give_the_same_weights() -> None:
    first, second = fit("contrastive"), fit("contrastive")
    assert first.identity == second.identity
    assert first.identity != fit("contrastive", CONFIG.model_copy(update={"seed": 1})).identity
    assert first.identity != fit("supervised").identity


def test_file_round_trip(tmp_path: Path) -> None:
    teacher = fit("supervised")
    teacher.save(tmp_path / "teacher")
    loaded = build_teacher("supervised", tmp_path / "teacher")
    assert (loaded.identity, loaded.width, loaded.grid_side, loaded.has_cls) == (teacher.identity, 16, 4, True)
    images = stripes(4)[0].float() / 127.5 - 1
    assert torch.equal(loaded.patch_features(images), teacher.patch_features(images))
    assert loaded.patch_features(images, grid=(4, 6)).shape == (4, 24, 16)
    with pytest.raises(UserError, match=r"expected a contrastive, but config\.json says it holds 'supervised'"):
        build_teacher("contrastive", tmp_path / "teacher")
    with pytest.raises(UserError, match="fit-teacher supervised"):
        build_teacher("supervised", None)


def test_nt_xent_by_hand() -> None:
    torch.manual_seed(0)
    z_2BD = torch.randn(2, 3, 5)
    views = [*z_2BD[0], *z_2BD[1]]
    total = 0.0
    for i, view in enumerate(views):
        scores = {
            j: math.exp((view @ other / (view.norm() * other.norm())).item() / 0.2)
            for j, other in enumerate(views)
            if j != i
        }
        total -= math.log(scores[(i + 3) % 6] / sum(scores.values()))
    assert nt_xent(z_2BD).item() == pytest.approx(total / 6, rel=1e-5)


def test_augmentation_draws_for_each_image() -> None:
    """Twins come out different, a draw is repeatable, and values stay pixels."""
    images = (stripes(1)[0].float() / 127.5 - 1).expand(8, -1, -1, -1)
    first, second = (augmented(images, generator(0, "test"), least_area=0.3) for _ in range(2))
    assert torch.equal(first, second)
    assert first.abs().max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in first}) == 8


def test_what_cannot_be_learnt_from_is_refused() -> None:
    pixels, labels = stripes()
    with pytest.raises(UserError, match="8 images, but a batch has 16"):
        fit_conv_teacher("contrastive", pixels[:8], None, CONFIG, CPU)
    for none in (None, labels * 0):
        with pytest.raises(UserError, match=r"no labels of at least two classes.*fit-teacher contrastive"):
            fit_conv_teacher("supervised", pixels, none, CONFIG, CPU)
    with pytest.raises(UserError, match="pixels_per_cell must be 4, 8 or 16"):
        validate(ConvNetConfig, {"pixels_per_cell": 5}, "config.json")
