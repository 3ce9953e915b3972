"""Captions lie beside the tiles, whatever their length."""

from __future__ import annotations

import numpy as np
import pytest

from mepa_ds.images.sheets import Sheet, draw_sheet

LONG = "a very long class name, such as those of ImageNet, with an Unbreakablewordthatislongerthanthecolumnallows in it"


def tiles(rows: int, columns: int, side: int) -> list[list[np.ndarray]]:
    """Noise, which a caption that covers it would change."""
    rng = np.random.default_rng(0)
    return [[rng.integers(0, 255, (side, side, 3), np.uint8) for _ in range(columns)] for _ in range(rows)]


def tile_at(sheet: Sheet, row: int, column: int) -> np.ndarray:
    top, left = sheet.places[row][column]
    height, width = sheet.tile
    return sheet.pixels_HW3[top : top + height, left : left + width]


@pytest.mark.parametrize("side", [7, 64, 100])
@pytest.mark.parametrize("text", ["", "3 Dress", LONG, f"{LONG}\n{LONG}"])
def test_captions_cover_no_pixel_of_a_tile(side: int, text: str) -> None:
    drawn = tiles(2, 3, side)
    legend = [(f"expert {number}", (number, 0, 0)) for number in range(12)] if text else []
    sheet = draw_sheet(drawn, title=text, columns=[text] * 3, rows=[text] * 2, legend=legend)
    factor = -(-64 // side)
    covered = np.zeros(sheet.pixels_HW3.shape[:2], bool)
    for row in range(2):
        for column in range(3):
            whole = drawn[row][column].repeat(factor, axis=0).repeat(factor, axis=1)
            assert np.array_equal(tile_at(sheet, row, column), whole)
            top, left = sheet.places[row][column]
            place = covered[top : top + sheet.tile[0], left : left + sheet.tile[1]]
            assert not place.any(), "tiles overlap"
            place[:] = True
    ink = (sheet.pixels_HW3 < 128).any(-1) & ~covered
    assert ink.any() == bool(text)
    for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
        assert not edge.any(), "a caption is cut off by the border"


def test_rows_may_have_holes_and_differ_in_length() -> None:
    first, second = tiles(1, 2, 64)[0]
    sheet = draw_sheet([[first, None], [second]], rows=["a", "b"])
    assert [len(row) for row in sheet.places] == [2, 1]
    assert np.array_equal(tile_at(sheet, 1, 0), second)
    assert (tile_at(sheet, 0, 1) == 255).all()
