"""The one decoder of images: encoded bytes -> RGB pixels, the same for shards, training and scores.

What it does with each kind of image (docs/data.md has the rules for users):

- 8-bit grey, palettes, CMYK (as Photoshop writes it), YCbCr and LAB are converted; embedded profiles are not used.
- Integers of 16 and 32 bits are read as 8-bit levels if none is above 255, else as 16-bit levels. Floats are read as 0
  to 1, or as 8-bit levels if all are whole numbers. Values of another range are refused: their white is unknown.
- Transparent parts (an alpha channel, a palette's entries, one colour) are laid over a background.
- Of several frames or pages the first is read.
- Photos are turned upright by their EXIF orientation.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mepa_ds.errors import DamagedError
from mepa_ds.safety.pictures import FORMATS, TooLargeError, open_image, orientation

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff")
"""File name endings of these formats (mepa_ds/safety/pictures.py has the list), in lower case."""

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""
WHITE: Colour = (255, 255, 255)

# Pillow warns of metadata that it cannot read, and of large images, which `open_image` refuses. A filter set for each
# call would not be safe: images are decoded in threads, which share the filters.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class _UnsuitableError(Exception):
    """The image is whole but cannot be used. The message has the remedy."""


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name, a path or not; hidden ones, such as the `._1.jpg` of macOS, are not."""
    base = name.rpartition("/")[2]
    return "." in base and base.rpartition(".")[2].lower() in EXTENSIONS and not base.startswith(".")


def decode_image(
    data: bytes, where: str, background: Colour = WHITE, remedy: str = "replace or remove it"
) -> Image.Image:
    """The image as RGB, upright, transparent parts laid over `background`.

    Args:
        where: names the image in messages.
        remedy: what the caller's user can do about an image that is damaged.

    Raises:
        DamagedError: the bytes are of no format that is read, or are cut short; or the image has more pixels than are
            read (mepa_ds.safety.pictures), or values of an unknown range.
    """
    try:
        return _decode(data, background)
    except _UnsuitableError as error:
        raise DamagedError(f"{where}: {error}") from error
    except TooLargeError as error:
        raise DamagedError(f"{where}: the image is too large: {error}; resize it first") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DamagedError(f"{where}: the image is too large: {_one_line(str(error))}; resize it first") from error
    except Exception as error:  # a plugin raises whatever its parsing meets: KeyError, struct.error, MemoryError...
        raise DamagedError(f"{where}: not a readable image: {_reason(error, data)}; {remedy}") from error


def size_of(data: bytes, where: str) -> tuple[int, int]:
    """Width and height as the header has them, before any rotation. Raises DamagedError as `decode_image` does."""
    try:
        return open_image(data).size
    except Exception:  # a plugin raises whatever its parsing meets; the decoder says it in words
        return decode_image(data, where).size


def _decode(data: bytes, background: Colour) -> Image.Image:
    image = open_image(data)
    raw_mode = _raw_mode(image)
    image.load()
    turn = _BY_ORIENTATION.get(orientation(image))
    image = _to_rgb(image, raw_mode, background)
    return image if turn is None else image.transpose(turn)


def _raw_mode(image: Image.Image) -> str:
    """How a PNG's pixels are stored, such as `L;4`: its transparent colour is given in those units."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if image.format == "PNG" and tiles else ""


def _to_rgb(image: Image.Image, raw_mode: str, background: Colour) -> Image.Image:
    mode, colour = image.mode, image.info.get("transparency")
    if mode == "RGB" and colour is None:
        return image
    if colour is not None and (mode in ("1", "L", "RGB") or mode.startswith("I;16")):
        return _without_colour(image, raw_mode, colour, background)
    if image.has_transparency_data:
        return _laid_over(image, background)
    return _opaque_to_rgb(image)


def _opaque_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_levels(image)).convert("RGB")
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    return image.convert("RGB")


def _without_colour(image: Image.Image, raw_mode: str, colour: Any, background: Colour) -> Image.Image:
    """One colour of an image without alpha means "nothing here" (a PNG's tRNS)."""
    if raw_mode in ("L;2", "L;4"):
        colour *= {"L;2": 85, "L;4": 17}[raw_mode]
    elif raw_mode == "RGB;16B":  # of which Pillow keeps the high bytes
        colour = tuple(value >> 8 for value in colour)
    elif image.mode == "1":
        colour = bool(colour)
    is_colour = np.asarray(image) == colour
    pixels_HW3 = np.array(_opaque_to_rgb(image))
    pixels_HW3[is_colour.all(axis=2) if image.mode == "RGB" else is_colour] = background
    return Image.fromarray(pixels_HW3)


def _laid_over(image: Image.Image, background: Colour) -> Image.Image:
    if image.mode == "La":  # premultiplied, which Pillow converts to LA alone
        image = image.convert("LA")
    ground = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _levels(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W) 8-bit levels of greyscale values that have more bits; Pillow's own conversion clips them at 255."""
    values_HW = np.asarray(image)
    levels_HW = (values_HW.astype(np.float32) / _values_per_level(image, values_HW)).round().astype(np.uint8)
    is_inverted = _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO
    return 255 - levels_HW if is_inverted else levels_HW


def _values_per_level(image: Image.Image, values_HW: NDArray[Any]) -> float:
    """How large one of 255 levels is in the image's own units."""
    low, high = float(values_HW.min()), float(values_HW.max())
    if image.mode == "F":
        if low >= 0 and high <= 1:
            return 1 / 255
        if low >= 0 and high <= 255 and (values_HW == values_HW.round()).all():
            return 1
        raise _UnsuitableError(
            f"its floats run from {low:g} to {high:g}, and nothing says which of them is white: only 0 to 1, and whole "
            "numbers up to 255, are read; save it as 8- or 16-bit integers"
        )
    if low < 0 or high > 65535:
        raise _UnsuitableError(
            f"its 32-bit integers run from {low:.0f} to {high:.0f}, and nothing says which is white: only 0 to 255 "
            "and 0 to 65535 are read; save it as 8- or 16-bit integers"
        )
    if image.format == "PPM":
        return 257  # Pillow has scaled it to 16 bits
    if high <= 255:  # 8-bit levels in a wider file; as 16-bit ones they would all be black
        return 1
    bits = _tag(image, _BITS_PER_SAMPLE)
    return 4095 / 255 if bits == (12,) else 257


def _tag(image: Image.Image, number: int) -> Any:
    """A field of a TIFF; None if there is none, or it is another format."""
    return getattr(image, "tag_v2", {}).get(number)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    assert converted is not None
    return converted


def _reason(error: Exception, data: bytes) -> str:
    """What a plugin said, in one line. Builds store it for images that they leave out, so it must not vary."""
    if isinstance(error, UnidentifiedImageError):  # whose own words hold the address of an object
        for name in FORMATS:
            accepts = Image.OPEN[name][1]
            if accepts is not None and accepts(data[:16]) is True:
                return f"begins as {name}, but is cut short, damaged or of a kind that is not read (64-bit floats?)"
        return f"cannot identify its format (read are {', '.join(FORMATS)})"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    said = _one_line(str(error))
    if not said or not isinstance(error, (OSError, SyntaxError, ValueError)):  # such as the mere key of a KeyError
        said = f"{type(error).__name__} {said}".strip()
    return said


def _one_line(text: str) -> str:
    return _ADDRESS.sub("", " ".join(text.split()))[:300]
