"""Image tensors: checked, and written as PNG files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path, check_regular
from mepa_ds.images.sheets import draw_sheet

_MADE_BY = "mepa_ds"
_MOST_CHUNKS, _MOST_TEXT = 64, 1 << 16
_BEGIN, _END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


def check_floats(images_B3HW: Tensor) -> None:
    """Raises UserError for pixels that cannot be in [-1, 1]: integers."""
    if not images_B3HW.is_floating_point():
        kind = str(images_B3HW.dtype).removeprefix("torch.")
        raise UserError(f"images: expected floats in [-1, 1], got {kind}; for 0..255 give images.float() / 127.5 - 1")


def to_uint8(images_B3HW: Tensor) -> NDArray[np.uint8]:
    """[0, 1] -> (B, H, W, 3) uint8 by x 255 + 0.5, rounded down (the ADM evaluation's convention)."""
    return images_B3HW.mul(255).add(0.5).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def signed_to_uint8(images_B3HW: Tensor) -> NDArray[np.uint8]:
    """[-1, 1], as networks have them -> (B, H, W, 3) uint8."""
    return to_uint8(images_B3HW.float().add(1).div(2))


def save_png(pixels_HW3: NDArray[np.uint8], path: Path, made_by: str | None = None) -> None:
    """`made_by`, which is ASCII, is kept in the file: see `made_by_of`."""
    information = PngInfo()
    if made_by is not None:
        information.add_text(_MADE_BY, made_by)
    with atomic_path(path) as temporary:
        Image.fromarray(pixels_HW3).save(temporary, format="PNG", pnginfo=information)


def is_whole_png(path: Path) -> bool:
    """Whether the file is there and a PNG to its end: not empty or cut short, as full disks and broken copies leave."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            if file.read(len(_BEGIN)) != _BEGIN:
                return False
            file.seek(-len(_END), os.SEEK_END)
            return file.read() == _END
    except OSError:
        return False


def made_by_of(path: Path) -> str | None:
    """The text that `save_png` stored in a file; None for a file without it, or one that is no PNG.

    Nothing is decoded, and little is read: the text stands before the pixels, in a chunk that is not packed.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            if file.read(len(_BEGIN)) != _BEGIN:
                return None
            for _ in range(_MOST_CHUNKS):
                head = file.read(8)
                length, kind = int.from_bytes(head[:4], "big"), head[4:]
                if kind == b"IDAT" or len(head) < 8:
                    return None
                if kind == b"tEXt" and length <= _MOST_TEXT:
                    word, _, text = file.read(length).partition(b"\0")
                    if word == _MADE_BY.encode():
                        return text.decode("latin-1")
                    length = 0
                file.seek(length + 4, os.SEEK_CUR)
    except OSError:
        pass
    return None


def save_images(images_B3HW: Tensor, paths: Sequence[Path], made_by: str | None = None) -> None:
    """One PNG for each image."""
    for pixels, path in zip(to_uint8(images_B3HW), paths, strict=True):
        save_png(pixels, path, made_by)


def save_grid(images_B3HW: Tensor, path: Path, columns: int, *, title: str = "", rows: Sequence[str] = ()) -> None:
    """One PNG of all images in [0, 1], row by row; small images are enlarged. `rows`: a caption for each row."""
    tiles = list(to_uint8(images_B3HW))
    table = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    save_png(draw_sheet(table, title=title, rows=rows).pixels_HW3, path)
