"""scikit-learn's handwritten digits: 1797 real images, 10 classes, part of the package, no download."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mepa_ds.data_tools.readers.source import heldout_mask
from mepa_ds.errors import UserError

_HELDOUT_SHARE = 1 / 6


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits, upscaled to RGB squares."""

    split: Literal["train", "heldout"] = "train"
    """A fixed, stratified split: 1498 images to train on, 299 held out."""
    side: int = 32
    """Pixels; the originals have 8 x 8 and are upscaled bicubically."""

    def open(self, scratch: Path | None) -> DigitsSource:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError("digits: needs scikit-learn; pip install 'mepa_ds[quickstart]'") from error
        data = load_digits()
        heldout = heldout_mask(data.target, _HELDOUT_SHARE)
        chosen = np.flatnonzero(heldout if self.split == "heldout" else ~heldout)
        pixels = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
        return DigitsSource(pixels, data.target[chosen], chosen, self)


class DigitsSource:
    name = "digits"
    classes = tuple(str(digit) for digit in range(10))

    def __init__(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.int64], numbers: NDArray[np.int64], options: Digits
    ):
        self._pixels, self._labels, self._numbers, self._side = pixels, labels, numbers, options.side
        self.settings: dict[str, Any] = {"split": options.split, "side": options.side}

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, number: int) -> int:
        return int(self._labels[number])

    def describe(self, number: int) -> str:
        return f"digit {self._numbers[number]}"

    def load(self, number: int) -> tuple[str, bytes]:
        image = Image.fromarray(self._pixels[number]).resize((self._side, self._side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return "png", buffer.getvalue()
