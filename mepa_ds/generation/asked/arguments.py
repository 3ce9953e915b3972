"""From options to arguments of the sampler: classes, settings by scale, and what stays of a given image."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mepa_ds.errors import UserError
from mepa_ds.files import read_file
from mepa_ds.generation.asked.options import SampleOptions
from mepa_ds.generation.class_names import parse_classes

if TYPE_CHECKING:
    from PIL import Image

    from mepa_ds.generation.editing import Given
    from mepa_ds.models.transformer import NextScaleTransformer
    from mepa_ds.tokenizer.tokenizer import Tokenizer

_MOST_BYTES = 1 << 28
_WHITE = 128


@dataclass(frozen=True)
class Asked:
    """What is drawn, image by image, and how."""

    classes: list[int | None]
    """One row of the grid each; None is no class."""
    labels: list[int | None]
    """Of each image."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `sample` that all images share."""
    others: dict[str, int] = field(default_factory=dict)
    """Classes that each image has besides its own: `negative`, `towards`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What of a given image decides the images: hashes."""

    def arguments(self, part: range) -> dict[str, Any]:
        """Arguments of `sample` for a range of images, but for labels and first_index."""
        return {**self.settings, **{name: [label] * len(part) for name, label in self.others.items()}}


def asked_of(options: SampleOptions, model: NextScaleTransformer, tokenizer: Tokenizer) -> Asked:
    """Reads classes, settings and the given image. Raises UserError for what does not fit the model."""
    num_classes, names = model.config.num_classes, model.class_names
    classes: list[int | None] = [None]
    if options.classes.strip() != "none":
        classes = list(parse_classes(options.classes, num_classes, names))
    others = {}
    for name in ("negative", "towards"):
        if (text := getattr(options, name)) is not None:
            found = parse_classes(text, num_classes, names, option=f"--{name}")
            if len(found) != 1:
                raise UserError(f"--{name}: expected one class, got {len(found)}")
            others[name] = found[0]
    settings: dict[str, Any] = {
        "cfg": one_or_all(options.cfg),
        "cfg_schedule": options.cfg_schedule,
        "guided_scales": options.guided_scales,
        "temperature": one_or_all(options.temperature),
        "top_k": one_or_all(options.top_k),
        "top_p": one_or_all(options.top_p),
        "seed": options.seed,
        "smooth": options.smooth,
        "rng": options.rng,
        "compiled": options.compiled,
        **({"share": options.share} if "towards" in others else {}),
    }
    facts: dict[str, Any] = {}
    if options.image is not None:
        settings["given"], facts = _given(options, options.image, tokenizer)
    labels = [label for label in classes for _ in range(options.per_class)]
    return Asked(classes, labels, settings, others, facts)


def one_or_all(value: Any) -> Any:
    """What the sampler takes: a single value for all scales is no sequence."""
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _given(options: SampleOptions, path: Path, tokenizer: Tokenizer) -> tuple[Given, dict[str, Any]]:
    import hashlib

    import torch

    from mepa_ds.generation.editing import Given, keep_outside, keep_scales
    from mepa_ds.images.decoding import decode_image
    from mepa_ds.images.resizing import fit_image

    data = _bytes_of(path, "--image")
    image = decode_image(data, f"--image: {path}", remedy="give another one")
    side = tokenizer.config.image_side
    facts = {"image": hashlib.sha256(data).hexdigest()[:16]}
    if options.repaint is None:
        assert options.keep_scales is not None
        try:
            keep_L = keep_scales(options.keep_scales, tokenizer.schedule)
        except UserError as error:
            raise UserError(f"--keep-scales: {error}") from error
        facts["keep_scales"] = str(options.keep_scales)
    else:
        mask_data = _bytes_of(options.repaint, "--repaint")
        mask = decode_image(mask_data, f"--repaint: {options.repaint}", remedy="give another one")
        if mask.size != image.size:
            sizes = f"{mask.width} x {mask.height} pixels, the image {image.width} x {image.height}"
            raise UserError(f"--repaint: {options.repaint} has {sizes}; give a mask of the same size")
        repaint = _white(fit_image(mask, side))
        if not repaint.any():
            where = "" if mask.width == mask.height else " in the square that the image is cut to"
            raise UserError(
                f"--repaint: {options.repaint}: nothing of it is white{where}; paint white what is to change"
            )
        keep_L = keep_outside(repaint, tokenizer.schedule)
        facts["repaint"] = hashlib.sha256(mask_data).hexdigest()[:16]
    pixels = torch.from_numpy(np.array(fit_image(image, side))).permute(2, 0, 1)[None].float()
    device = next(tokenizer.parameters()).device
    with torch.no_grad():
        tokens_1L = tokenizer.encode((pixels / 127.5 - 1).to(device)).cpu()
    return Given(tokens_1L, keep_L), facts


def _white(mask: Image.Image) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray(np.array(mask.convert("L")) >= _WHITE)


def _bytes_of(path: Path, option: str) -> bytes:
    try:
        return read_file(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{option}: {path}: cannot be read: {why}; give an image") from None
