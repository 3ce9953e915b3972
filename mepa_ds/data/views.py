"""Which square part of an image is encoded: its centre, or K random crops, chosen once and stored.

Shape legend: B batch, K views, H and W of the resized image, S the crop's side, h and w rows and columns of a feature
map, N = g * g cells of a crop, C channels.

Random crops are VAR's: the shorter side is resized to 1.125 S, then S x S pixels are taken anywhere. A crop is a pure
function of (seed, key, sizes), so tokens and features made at different times on different machines have the same
crops.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.images.resizing import RESIZE_RATIO, fit_image, resize_shorter
from mepa_ds.random_streams import SPLITMIX64_INCREMENT, splitmix64

BOX_EXT = "box.npy"
"""(K, 4) float32: top, left, bottom, right of each random crop, as fractions of the image's height and width."""
CENTRE = "centre"
WHOLE = "whole"
"""Views of a feature set: one map of the whole image, which the loader reads at the token set's boxes."""

Boxes = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Views:
    """`count` random crops of S = `side` pixels drawn with `seed`; or, with count 0, the centre alone."""

    side: int
    count: int = 0
    seed: int = 0

    @classmethod
    def parse(cls, text: str, side: int, seed: int = 0) -> Views:
        """From `centre` or `random:K`."""
        if text == CENTRE:
            return cls(side)
        if (match := re.fullmatch(r"random:([1-9][0-9]*)", text)) is None:
            raise UserError(f"views: {text!r} is neither {CENTRE!r} nor random:K, such as random:10")
        return cls(side, int(match.group(1)), seed)

    @property
    def settings(self) -> dict[str, Any]:
        """What the index of a set stores about its views; see `check_same_views`."""
        if self.count == 0:
            return {"views": CENTRE, "image_side": self.side}
        return {"views": f"random:{self.count}", "image_side": self.side, "views_seed": self.seed}

    def crop(self, image: Image.Image, key: str) -> tuple[npt.NDArray[np.uint8], Boxes | None]:
        """An RGB image of any size -> pixels (K, S, S, 3) and boxes (K, 4) as in BOX_EXT; centre: K = 1, no boxes."""
        if self.count == 0:
            return np.asarray(fit_image(image, self.side))[None], None
        pixels_HW3 = np.asarray(resize_shorter(image, round(RESIZE_RATIO * self.side)))
        height, width = pixels_HW3.shape[:2]
        corners = self.corners(key, height, width)
        crops = np.stack([pixels_HW3[top : top + self.side, left : left + self.side] for top, left in corners])
        boxes = np.array([(top, left, top + self.side, left + self.side) for top, left in corners])
        return crops, (boxes / [height, width, height, width]).astype(np.float32)

    def corners(self, key: str, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) in pixels of each random crop of a resized image."""
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(2 * self.count).reshape(-1, 2)
        free = (height - self.side + 1, width - self.side + 1)
        # A modulus of 64 random bits: small numbers are preferred by less than one part in 2^50 at any image size.
        return [(int(row % free[0]), int(column % free[1])) for row, column in bits.tolist()]


def check_same_views(tokens: Mapping[str, Any], features: Mapping[str, Any], where: str) -> None:
    """Compares the settings (`MadeBy.settings`) of a token set and a feature set.

    Raises UserError unless view k of both is the same part of the image, or the features are of the whole image and
    the tokens have boxes to read it at.
    """
    names = ("views", "image_side", "views_seed")
    if features.get("views") == WHOLE:
        same = tokens.get("views", CENTRE) != CENTRE
    else:
        same = all(tokens.get(name) == features.get(name) for name in names)
    if not same:
        shown = [
            ", ".join(f"{name} {settings[name]}" for name in names if name in settings)
            for settings in (tokens, features)
        ]
        raise UserError(
            f"{where}: tokens and features show different parts of the images (tokens: {shown[0]}; features: "
            f"{shown[1]}); precompute one of them again with the other's --views, --views-seed and --image-side"
        )


def whole_grid(height: int, width: int, grid_side: int) -> tuple[int, int]:
    """(rows, columns) of a feature map of the whole image whose cells are as large as those of its random crops."""
    per_pixel = RESIZE_RATIO * grid_side / min(height, width)
    return round(height * per_pixel), round(width * per_pixel)


def choose_views(seed: int, positions_B: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """(B,) which of `count` views stands at each position of the training stream: a pure function of both.

    A hash (SplitMix64) of seed and position, so that resuming needs no generator state.
    """
    with np.errstate(over="ignore"):
        bits = splitmix64(positions_B.astype(np.uint64) + np.uint64(seed % 2**64) * SPLITMIX64_INCREMENT)
    return (bits % np.uint64(count)).astype(np.int64)


def sample_boxes(map_BhwC: Tensor, boxes_B4: Tensor, grid_side: int) -> Tensor:
    """Features (B, N, C) of crops, read from feature maps of whole images (B, h, w, C) by bilinear interpolation.

    boxes_B4: top, left, bottom, right as fractions of the image. Cell (i, j) of a crop is read at its middle. This
    stands in for running the teacher on the crop; docs/data.md has measurements of the difference.
    """
    steps_g = (torch.arange(grid_side, device=map_BhwC.device) + 0.5) / grid_side
    top_B, left_B, bottom_B, right_B = boxes_B4.to(map_BhwC.device).float().unbind(1)
    y_Bg = top_B[:, None] + (bottom_B - top_B)[:, None] * steps_g
    x_Bg = left_B[:, None] + (right_B - left_B)[:, None] * steps_g
    y_Bgg, x_Bgg = y_Bg[:, :, None].expand(-1, -1, grid_side), x_Bg[:, None, :].expand(-1, grid_side, -1)
    where_Bgg2 = torch.stack([x_Bgg, y_Bgg], dim=-1) * 2 - 1
    sampled_BCgg = F.grid_sample(
        map_BhwC.permute(0, 3, 1, 2), where_Bgg2.to(map_BhwC.dtype), padding_mode="border", align_corners=False
    )
    return sampled_BCgg.flatten(2).transpose(1, 2)
