"""Some hundred of the images, opened: their sizes, whether they are grey, and what cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mepa_ds.data.shard_set import spread
from mepa_ds.data_tools.readers.source import Source
from mepa_ds.errors import DamagedError
from mepa_ds.images.decoding import decode_image, size_of
from mepa_ds.progress import Progress
from mepa_ds.project.looking.facts import Colour

_OPENED, _DECODED = 400, 64
_RANGES = (16, 32, 64, 128, 256, 512)


@dataclass
class Opened:
    sides: list[int] = field(default_factory=list)
    is_one_square: bool = True
    num_grey: int = 0
    num_colour: int = 0
    unreadable: list[str] = field(default_factory=list)

    @property
    def colour(self) -> Colour:
        if self.num_grey and self.num_colour:
            return "mixed"
        return "grey" if self.num_grey else "colour"


def open_some(listing: Source) -> Opened:
    """Headers of some hundred images; of every few the pixels too, to see whether they are grey."""
    numbers = spread(len(listing), _OPENED)
    every = max(len(numbers) // _DECODED, 1)
    opened, shapes = Opened(), set[tuple[int, int]]()
    for place, number in enumerate(Progress(numbers, "looking", unit="image", delay=2)):
        where = listing.describe(number)
        try:
            data = listing.load(number)[1]
            width, height = size_of(data, where)
            if place % every == 0:
                is_grey = _is_grey(np.asarray(decode_image(data, where)))
                opened.num_grey += is_grey
                opened.num_colour += not is_grey
        except DamagedError as error:
            opened.unreadable.append(str(error))
            continue
        opened.sides.append(min(width, height))
        shapes.add((width, height))
    opened.is_one_square = len(shapes) == 1 and all(width == height for width, height in shapes)
    return opened


def _is_grey(pixels_HW3: np.ndarray[Any, Any]) -> bool:
    """JPEG's rounding moves channels apart by a level or two."""
    return int(np.ptp(pixels_HW3.astype(np.int16), axis=2).max()) <= 4


def range_of(side: int) -> str:
    low = 1
    for high in _RANGES:
        if side <= high:
            return f"{low}-{high}"
        low = high + 1
    return f"over {_RANGES[-1]}"
