"""A run's pictures made small enough for a page: samples, or reconstructions of a tokenizer."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from mepa_ds.files import check_regular, read_file
from mepa_ds.reports.page.series import spread
from mepa_ds.safety.pictures import open_image

_FOLDERS = ("samples", "reconstructions")
_WIDTHS = (840, 640, 480, 360)
_MOST, _FEWEST = 16, 5
_QUALITY = 80
_HEAD_BYTES, _MOST_BYTES = 1 << 16, 1 << 28


@dataclass
class Pictures:
    """Pictures of one run: `steps` and `sources` (data: URIs) belong together.

    `left_out` says that not all are shown, `notes` what is wrong with some.
    """

    steps: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    left_out: str = ""
    notes: list[str] = field(default_factory=list)


def run_pictures(directory: Path, expected: Sequence[str], budget: int) -> Pictures:
    """Reads samples/step_*.png or reconstructions/step-*.png, evenly spread over the run, the newest among them.

    Args:
        expected: paths of pictures, from the run's directory, that its records name.
        budget: bytes that they may have in the page, together.
    """
    pictures = Pictures()
    found = sorted((number, path) for folder in _FOLDERS for path in (directory / folder).glob("step[-_]*.png")
                   if (number := _step_of(path)) is not None)  # fmt: skip
    missing = [name for name in expected if not (directory / name).is_file()]
    if missing:
        pictures.notes.append(_some(missing, "that the log names are not there"))
    whole, broken = list[tuple[int, Path]](), list[tuple[int, Path]]()
    for item in found:
        (whole if _opens(item[1]) else broken).append(item)
    while whole and (newest := _pixels(whole[-1][1])) is None:
        broken.append(whole.pop())
    if whole and newest is not None:
        width, count = _fitting(newest, len(whole), budget)
        chosen = spread(whole, count)
        if len(chosen) < len(whole):
            pictures.left_out = f"{len(chosen)} of {len(whole)} pictures are shown, evenly spread over the run."
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow computes without the interpreter's lock
            encoded = list(pool.map(lambda item: _encoded(_pixels(item[1]), width), chosen))
        for item, source in zip(chosen, encoded, strict=True):
            if source is None:
                broken.append(item)
            else:
                pictures.steps.append(item[0])
                pictures.sources.append(source)
    if broken:
        names = [str(path.relative_to(directory)) for _, path in sorted(broken)]
        pictures.notes.append(_some(names, "cannot be read as pictures (cut short or damaged)"))
    return pictures


def _step_of(path: Path) -> int | None:
    found = re.fullmatch(r"step[-_](\d+)", path.stem)
    return int(found[1]) if found else None


def _opens(path: Path) -> bool:
    """Whether its header is one of a picture that may be decoded."""
    try:
        open_image(_head(path), ("PNG",))
    except Exception:  # Pillow raises a dozen kinds
        return False
    return True


def _head(path: Path) -> bytes:
    check_regular(path)
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)


def _fitting(newest: Image.Image, count: int, budget: int) -> tuple[int, int]:
    """Returns the width of pictures and their number: as many as the budget has room for, wide if at least 5 fit."""
    size = 1
    for width in _WIDTHS:
        size = len(_encoded(newest, width) or "")
        if size * min(count, _FEWEST) <= budget:
            break
    return width, max(min(_MOST, count, budget // size), 1)


def _pixels(path: Path) -> Image.Image | None:
    """Returns None for a broken picture."""
    try:
        return open_image(read_file(path, _MOST_BYTES), ("PNG",)).convert("RGB")
    except Exception:  # Pillow raises a dozen kinds
        return None


def _encoded(pixels: Image.Image | None, width: int) -> str | None:
    """Returns the picture, at most `width` pixels wide, as a data: URI of WebP."""
    if pixels is None:
        return None
    if pixels.width > width:
        height = max(round(pixels.height * width / pixels.width), 1)
        pixels = pixels.resize((width, height), reducing_gap=2.0)
    buffer = io.BytesIO()
    pixels.save(buffer, "WEBP", quality=_QUALITY, method=1)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _some(names: Sequence[str], what: str, most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"Pictures {', '.join(names[:most])}{more} {what}."
