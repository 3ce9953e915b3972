"""Samples that many jobs drew, as one file for evaluation suites.

classes WEIGHTS PARTS PART             the classes of one part, with commas between
pack WEIGHTS IMAGES PER_CLASS OUT      OUT.npz with `arr_0`, uint8 (N, H, W, 3), as ADM's evaluation suite reads it
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path

_SEED = 0


def num_classes(weights: Path) -> int:
    """Classes of an exported model."""
    path = weights / "config.json"
    try:
        return int(json.loads(path.read_text())["num_classes"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a model's config: {error}") from error


def classes_of_part(weights: Path, parts: int, part: int) -> list[int]:
    """Classes part, part + parts, ...: all parts are of one size, give or take one class."""
    return list(range(part, num_classes(weights), parts))


def pack(weights: Path, images: Path, per_class: int, out: Path) -> int:
    """Writes all images into `out`, in an order drawn with a fixed seed; returns their number.

    The inception score of the suite is a mean over contiguous splits that it does not shuffle: images in the order of
    their classes would score about a fifth of their worth.

    Raises:
        UserError: a class has fewer or more images than `per_class`, or an image has another size or mode.
    """
    paths = []
    for label in range(num_classes(weights)):
        found = sorted(images.glob(f"class{label:04d}_*.png"))
        if len(found) != per_class:
            raise UserError(
                f"{images}: {len(found)} images of class {label}, not {per_class}; remove the directory if they are "
                "from another start, and generate again"
            )
        paths += found
    first = _pixels(paths[0])
    order = np.random.default_rng(_SEED).permutation(len(paths))
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *first.shape)}
    with (
        atomic_path(out) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_2_0(file, header)  # type: ignore[arg-type]
        # Image by image: 50 000 of them would need 10 GB of memory as one array.
        for number in tqdm(order.tolist(), desc="packing", unit="image", disable=None):
            pixels = _pixels(paths[number])
            if pixels.shape != first.shape:
                raise UserError(f"{paths[number]}: {pixels.shape}, but {paths[0]} is {first.shape}; generate again")
            file.write(pixels.tobytes())
    return len(paths)


def _pixels(path: Path) -> np.ndarray:  # type: ignore[type-arg]
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def main(argv: Sequence[str]) -> None:
    action, weights, *rest = argv
    if action == "classes":
        print(",".join(map(str, classes_of_part(Path(weights), int(rest[0]), int(rest[1])))))
        return
    images, per_class, out = Path(rest[0]), int(rest[1]), Path(rest[2])
    count = pack(Path(weights), images, per_class, out)
    print(f"{out}: {count} images as arr_0, {num_classes(Path(weights))} classes", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
