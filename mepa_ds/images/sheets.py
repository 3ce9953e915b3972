"""Sheets: equal tiles in rows and columns on white, with a title, captions of columns above and of rows at the left.

No caption covers a tile or another caption: what is too long is broken into lines, and the last of them is cut short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mepa_ds.images.decoding import Colour

Pixels = NDArray[np.uint8]
"""(height, width, 3), 0 to 255."""

LEAST_SIDE = 64
"""Smaller tiles are enlarged by a whole factor."""
_GAP, _MARGIN = 2, 6
_LEAST_SIZE, _MOST_SIZE = 12, 24  # of letters; between them they grow with the tiles
_TILES_A_LETTER = 12
_ROW_CAPTION = 12  # the most width of a row's caption, in letters' sizes
_TITLE_WIDTH = 320  # a narrow sheet grows to this, so that its title needs few lines
_INK, _CUT = "#222222", "..."
_MOST_TEXT = 400  # characters; longer ones fit nowhere, and measuring them takes a while


@dataclass(frozen=True)
class Sheet:
    """A sheet, drawn."""

    pixels_HW3: Pixels
    places: tuple[tuple[tuple[int, int], ...], ...]
    """(top, left) of each tile, row by row."""
    tile: tuple[int, int]
    """Height and width of a tile on the sheet."""


def draw_sheet(
    rows_of_tiles: Sequence[Sequence[Pixels | None]],
    *,
    title: str = "",
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    legend: Sequence[tuple[str, Colour]] = (),
    least_side: int = LEAST_SIDE,
) -> Sheet:
    """Lays out tiles of one size; None leaves a place empty, and rows may differ in length.

    Args:
        columns: captions above the columns; rows: captions at the left of the rows; each may be empty.
        legend: words and the colours that they explain, below the title.
    """
    tiles = [[None if tile is None else _enlarged(tile, least_side) for tile in row] for row in rows_of_tiles]
    height, width = next(tile.shape[:2] for row in tiles for tile in row if tile is not None)
    size = min(max(min(height, width) // _TILES_A_LETTER, _LEAST_SIZE), _MOST_SIZE)
    title_size = size + 2
    num_columns = max(map(len, tiles))
    captions = [_wrapped(text, size, _ROW_CAPTION * size, height) for text in rows]
    left = _MARGIN + (max((_width(text, size) for text in captions), default=0) + _MARGIN if any(rows) else 0)
    full = max(left + num_columns * (width + _GAP) - _GAP + _MARGIN, _TITLE_WIDTH if title else 0)
    heading = _wrapped(title, title_size, full - 2 * _MARGIN)
    above = [_wrapped(text, size, width) for text in columns]
    legend_top = _MARGIN + (_height(heading, title_size) + _MARGIN if title else 0)
    swatches, legend_height = _legend_places(legend, size, full - 2 * _MARGIN)
    columns_top = legend_top + legend_height
    top = columns_top + (max(_height(text, size) for text in above) + 4 if any(columns) else 0)
    sheet = Image.new("RGB", (full, top + len(tiles) * (height + _GAP) - _GAP + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((_MARGIN, _MARGIN), heading, _INK, _font(title_size))
    for (x, y), (text, colour) in zip(swatches, legend, strict=True):
        x, y = x + _MARGIN, y + legend_top
        draw.rectangle((x, y + 2, x + size - 1, y + size + 1), colour, _INK)
        draw.text((x + size + 3, y), text, _INK, _font(size))
    for number, text in enumerate(above[:num_columns]):
        at = (left + number * (width + _GAP), top - 4 - _height(text, size))
        draw.multiline_text(at, text, _INK, _font(size))
    places = []
    for number, row in enumerate(tiles):
        row_top = top + number * (height + _GAP)
        if number < len(captions):
            draw.multiline_text((_MARGIN, row_top), captions[number], _INK, _font(size))
        places.append(tuple((row_top, left + column * (width + _GAP)) for column in range(len(row))))
        for (_, at_left), tile in zip(places[-1], row, strict=True):
            if tile is not None:
                sheet.paste(Image.fromarray(tile), (at_left, row_top))
    return Sheet(np.array(sheet), tuple(places), (height, width))


def _legend_places(legend: Sequence[tuple[str, Colour]], size: int, width: int) -> tuple[list[tuple[int, int]], int]:
    """(x, y) of each entry, in lines of at most `width` pixels; and the height of all."""
    places, x, y, line = list[tuple[int, int]](), 0, 0, size + 5
    for text, _ in legend:
        own = size + 3 + _width(text, size) + 10
        if x and x + own > width:
            x, y = 0, y + line
        places.append((x, y))
        x += own
    return places, y + line + 4 if legend else 0


def resized(tile: Pixels, side: int, smooth: bool = True) -> Pixels:
    """A tile as a square of `side` pixels: bicubic, or with hard edges for a map of cells."""
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(tile).resize((side, side), method))


def _enlarged(tile: Pixels, least_side: int) -> Pixels:
    factor = max(-(-least_side // min(tile.shape[:2])), 1)
    return tile.repeat(factor, axis=0).repeat(factor, axis=1)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)  # Pillow's own: no font file is needed


@cache
def _measure() -> ImageDraw.ImageDraw:
    return ImageDraw.Draw(Image.new("RGB", (1, 1)))


def _width(text: str, size: int) -> int:
    return int(np.ceil(_measure().multiline_textbbox((0, 0), text, _font(size))[2])) if text else 0


def _height(text: str, size: int) -> int:
    """The same for all texts of as many lines, so that captions side by side are on one line."""
    if not text:
        return 0
    lines = "\n".join(["Ag"] * (text.count("\n") + 1))
    return int(np.ceil(_measure().multiline_textbbox((0, 0), lines, _font(size))[3]))


def _wrapped(text: str, size: int, width: int, height: int | None = None) -> str:
    """The text in lines of at most `width` pixels; what goes beyond `height` is cut off, marked by dots."""
    lines: list[str] = []
    for paragraph in text[:_MOST_TEXT].splitlines():
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and _width(longer, size) > width:
                lines.append(line)
                longer = word
            line = _cut(longer, size, width)
        lines.append(line)
    while height is not None and len(lines) > 1 and _height("\n".join(lines), size) > height:
        lines = [*lines[:-2], _cut(f"{lines[-2]} {_CUT}", size, width)]
    return "\n".join(lines)


def _cut(line: str, size: int, width: int) -> str:
    """The line, or its beginning with dots where it is too wide."""
    if _width(line, size) <= width:
        return line
    kept = line.removesuffix(_CUT)[:width]  # no letter is narrower than a pixel
    while kept and _width(kept + _CUT, size) > width:
        kept = kept[:-1]
    return kept + _CUT
