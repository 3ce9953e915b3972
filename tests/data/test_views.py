"""Views: VAR's crops, their determinism, reading a whole map at a box."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mepa_ds.data.views import Views, check_same_views, choose_views, sample_boxes, whole_grid
from mepa_ds.errors import UserError
from mepa_ds.images.resizing import resize_shorter


def image_of(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(width=st.integers(20, 90), height=st.integers(20, 90), key=st.text(min_size=1), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_random_crops_are_the_pixels_of_their_boxes(width: int, height: int, key: str, seed: int) -> None:
    views = Views.parse("random:3", side=32, seed=seed)
    image = image_of(width, height)
    crops, boxes = views.crop(image, key)
    assert crops.shape == (3, 32, 32, 3)
    assert boxes is not None
    assert boxes.shape == (3, 4)
    resized = np.asarray(resize_shorter(image, 36))
    assert min(resized.shape[:2]) == 36  # 1.125 * 32
    scale = np.array([*resized.shape[:2], *resized.shape[:2]])
    for crop, box in zip(crops, boxes, strict=True):
        top, left, bottom, right = np.rint(box * scale).astype(int)
        np.testing.assert_array_equal(crop, resized[top:bottom, left:right])
    again, boxes_again = views.crop(image, key)
    np.testing.assert_array_equal(crops, again)
    np.testing.assert_array_equal(boxes, boxes_again)


def test_crops_reach_every_corner_evenly() -> None:
    views = Views.parse("random:4", side=32)
    tops = np.array([corner for key in range(2000) for corner in views.corners(str(key), 36, 44)])
    assert set(tops[:, 0]) == set(range(5))
    assert set(tops[:, 1]) == set(range(13))
    counts = np.bincount(tops[:, 0])
    assert (abs(counts - 1600) < 5 * np.sqrt(1600)).all()
    assert views.corners("a", 36, 44) != Views.parse("random:4", 32, seed=1).corners("a", 36, 44)


def test_centre_of_a_stored_square_is_the_image() -> None:
    image = image_of(32, 32)
    crops, boxes = Views.parse("centre", side=32).crop(image, "any")
    np.testing.assert_array_equal(crops[0], np.asarray(image))
    assert boxes is None


def test_centre_crop_of_an_oblong_image() -> None:
    """VAR's: shorter side to 1.125 S, then the middle."""
    image = image_of(54, 36)
    crops, _ = Views.parse("centre", side=32).crop(image, "any")
    np.testing.assert_array_equal(crops[0], np.asarray(image)[2:34, 11:43])


CENTRE, RANDOM = Views(32).settings, Views(32, 4, seed=1).settings


@pytest.mark.parametrize(
    ("tokens", "features"),
    [(CENTRE, CENTRE), (RANDOM, RANDOM), (RANDOM, {"views": "whole"}), ({}, {})],
)
def test_views_that_go_together(tokens: dict[str, Any], features: dict[str, Any]) -> None:
    check_same_views(tokens, features, "data")


@pytest.mark.parametrize(
    ("tokens", "features"),
    [
        (CENTRE, RANDOM),
        (CENTRE, Views(36).settings),  # of a stored 36-pixel square one shows the middle, the other all
        (RANDOM, CENTRE),
        (CENTRE, {"views": "whole"}),
        (RANDOM, Views(32, 5, seed=1).settings),
        (RANDOM, Views(32, 4, seed=2).settings),
        (RANDOM, Views(48, 4, seed=1).settings),
    ],
)
def test_views_that_do_not_go_together(tokens: dict[str, Any], features: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"different parts of the images.*again with the other's --views"):
        check_same_views(tokens, features, "data")


@pytest.mark.parametrize("text", ["center", "random", "random:0", "random:-1", "whole:3"])
def test_unknown_views(text: str) -> None:
    with pytest.raises(UserError, match="neither 'centre' nor random:K"):
        Views.parse(text, side=256)


def test_whole_grid() -> None:
    assert whole_grid(288, 288, 16) == (18, 18)
    assert whole_grid(375, 500, 16) == (18, 24)


def test_choice_of_views_is_even_and_depends_on_position_alone() -> None:
    positions = np.arange(40_000)
    chosen = choose_views(7, positions, 10)
    counts = np.bincount(chosen, minlength=10)
    assert (abs(counts - 4000) < 5 * np.sqrt(4000)).all()
    np.testing.assert_array_equal(choose_views(7, positions[123:456], 10), chosen[123:456])
    # Neither the next position, nor the next epoch of 1000 samples, nor another seed repeats the choice.
    for other in (chosen[1:], chosen[1000:], choose_views(8, positions, 10)):
        assert abs((other == chosen[: len(other)]).mean() - 0.1) < 0.01


def test_sampling_a_map_at_cell_aligned_boxes_copies_cells() -> None:
    whole = torch.randn(2, 6, 8, 5)
    boxes = torch.tensor([[1 / 6, 2 / 8, 5 / 6, 6 / 8], [0, 0, 4 / 6, 4 / 8]])
    sampled = sample_boxes(whole, boxes, 4)
    torch.testing.assert_close(sampled[0], whole[0, 1:5, 2:6].reshape(16, 5), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sampled[1], whole[1, :4, :4].reshape(16, 5), rtol=1e-5, atol=1e-5)


@given(top=st.floats(0, 0.5), left=st.floats(0, 0.5))
@settings(max_examples=50, deadline=None)
def test_sampling_a_linear_map_gives_the_cells_middles(top: float, left: float) -> None:
    """Bilinear interpolation is exact on a map that is linear in the cells' middles, away from the border."""
    rows, columns, grid = 9, 12, 4
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    box = torch.tensor([[top, left, top + 0.5, left + 0.5]])
    sampled = sample_boxes(torch.stack([y, x], dim=-1)[None], box, grid)[0].view(grid, grid, 2)
    for i in range(grid):
        for j in range(grid):
            want_y, want_x = top + 0.5 * (i + 0.5) / grid, left + 0.5 * (j + 0.5) / grid
            if 0.5 / rows <= want_y <= 1 - 0.5 / rows and 0.5 / columns <= want_x <= 1 - 0.5 / columns:
                torch.testing.assert_close(sampled[i, j], torch.tensor([want_y, want_x]), rtol=0, atol=1e-5)
