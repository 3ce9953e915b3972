"""A run's pictures made small enough for a page: samples, or reconstructions of a tokenizer."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from mepa_ds.reports.page.series import spread

_FOLDERS = ("samples", "reconstructions")
_WIDTHS = (840, 640, 480, 360)
_MOST, _FEWEST = 16, 5
_QUALITY = 80


@dataclass
class Pictures:
    """Pictures of one run: `steps` and `sources` (data: URIs) belong together. `notes` say what is not shown."""

    steps: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
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
    whole, broken = [], []
    for item in found:
        (whole if _opens(item[1]) else broken).append(item)
    width = _WIDTHS[-1]
    while whole and (newest := _encoded(whole[-1][1], _WIDTHS[0])) is None:
        broken.append(whole.pop())
    if whole:
        size = len(newest or "")
        for width in _WIDTHS:
            size = len(_encoded(whole[-1][1], width) or "")
            if size * min(len(whole), _FEWEST) <= budget:
                break
        count = max(min(_MOST, budget // max(size, 1)), 1)
        chosen = [whole[number] for number in spread(range(len(whole)), count)]
        if len(chosen) < len(whole):
            pictures.notes.append(f"{len(chosen)} of {len(whole)} pictures are shown, evenly spread over the run.")
        with ThreadPoolExecutor(4) as pool:  # Pillow computes without the interpreter's lock
            encoded = list(pool.map(lambda item: _encoded(item[1], width), chosen))
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
    try:
        with Image.open(path, formats=("PNG",)):
            return True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _encoded(path: Path, width: int) -> str | None:
    """Returns the picture, at most `width` pixels wide, as a data: URI of WebP; None for a broken one."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            pixels = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    if pixels.width > width:
        height = max(round(pixels.height * width / pixels.width), 1)
        pixels = pixels.resize((width, height), Image.Resampling.BOX if pixels.width >= 2 * width else None)
    buffer = io.BytesIO()
    pixels.save(buffer, "WEBP", quality=_QUALITY, method=3)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _some(names: Sequence[str], what: str, most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"Pictures {', '.join(names[:most])}{more} {what}."
