"""VAR's transform of an image: the shorter side is resized, then a square is cropped."""

from __future__ import annotations

from PIL import Image

RESIZE_RATIO = 1.125
"""VAR resizes the shorter side to 1.125 x the crop's side (288 for 256) before it crops."""
_MAX_ASPECT = 16


def resize_shorter(image: Image.Image, side: int) -> Image.Image:
    """The shorter side becomes `side` pixels, Lanczos as in VAR; strips beyond 16:1 lose their ends first."""
    width, height = image.size
    longest = _MAX_ASPECT * min(width, height)
    if max(width, height) > longest:  # a 1 x 10000 strip would grow to gigabytes
        left, top = (max(length - longest, 0) // 2 for length in (width, height))
        image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        width, height = image.size
    if min(width, height) == side:
        return image
    # torchvision's integer formula: a factor side / shorter would round a square to side - 1 pixels.
    size = (side, side * height // width) if width <= height else (side * width // height, side)
    return image.resize(size, Image.Resampling.LANCZOS)


def crop_square(image: Image.Image, side: int, at: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """A `side` x `side` crop; `at` in [0, 1) for each axis, (0.5, 0.5) is the centre."""
    left = _place(image.width - side, at[0])
    top = _place(image.height - side, at[1])
    return image.crop((left, top, left + side, top + side))


def _place(spare: int, at: float) -> int:
    return round(spare / 2) if at == 0.5 else int(at * (spare + 1))  # half to even, as torchvision's CenterCrop


def fit_image(image: Image.Image, side: int, at: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """VAR's transform: shorter side to 1.125 x `side`, then a crop. Images that fit already are left as they are."""
    if image.size == (side, side):
        return image
    return crop_square(resize_shorter(image, round(RESIZE_RATIO * side)), side, at)


def adm_center_crop(image: Image.Image, side: int) -> Image.Image:
    """The preprocessing of ADM's references (guided-diffusion's center_crop_arr), by which public scores are defined.

    Halved by boxes while the shorter side has at least twice `side` pixels, then bicubic to `side`, then the centre.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
