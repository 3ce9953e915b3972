"""A directory of generated images: a PNG for each, made batch by batch, where a killed command goes on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.files import naming_full_disks
from mepa_ds.generation.class_names import file_word
from mepa_ds.images.decoding import is_image_name
from mepa_ds.images.pictures import is_whole_png, made_by_of, save_images
from mepa_ds.safety.reading import parse_json

_WITHOUT_NAME = re.compile(r"class(\d+)_\d+\.png")


def image_paths(directory: Path, labels: Sequence[int | None], names: Sequence[str]) -> list[Path]:
    """`class0003_Dress_00012.png` for each image, or `class0003_00012.png` for a class without a name.

    A directory that an earlier version began has no names in it, not even of classes that have one, and gets none.
    """
    begun = (found for path in directory.glob("class*.png") if (found := _WITHOUT_NAME.fullmatch(path.name)))
    if any(file_word(int(found[1]), names) != file_word(int(found[1]), ()) for found in begun):
        names = ()
    return [directory / f"{file_word(label, names)}_{number:05d}.png" for number, label in enumerate(labels)]


def fill_directory(
    paths: Sequence[Path],
    batches: Sequence[range],
    made_by: str,
    draw: Callable[[range], Tensor],
    skip: Callable[[int], object],
) -> int:
    """Writes one PNG for each image, batch by batch: 50 000 would not fit into memory. Returns how many were drawn.

    Batches that an earlier start has finished are left as they are; one with an empty or cut file is drawn again.

    Args:
        made_by: everything that the images are a function of, as JSON; it is kept in each file.
        draw: the images of a range, (B, 3, H, W) in [0, 1] on the CPU.
        skip: is called with the number of images of a batch that is there.

    Raises:
        UserError: an image was made with other options.
    """
    directory, drawn = paths[0].parent, 0
    _check_others(directory, paths, made_by)
    for part in batches:
        mine = paths[part.start : part.stop]
        there = [path for path in mine if is_whole_png(path)]
        for path in there[:1]:
            if made_by_of(path) != made_by:
                raise UserError(f"{path}: made by other weights or options; remove it, or choose another --out")
        if len(there) == len(mine):
            skip(len(mine))
            continue
        with naming_full_disks(directory):
            save_images(draw(part), mine, made_by)
        drawn += len(mine)
    return drawn


def _check_others(directory: Path, paths: Sequence[Path], made_by: str) -> None:
    """Refuses a directory with images of other kinds, since scores count all images in a directory.

    Other jobs may generate other classes into the same directory, with seeds of their own; everything else must be the
    same. One image of each class is opened.

    Raises:
        UserError: the directory has an image that neither this start nor such a job would make.
    """
    mine, my_classes = {path.name for path in paths}, {_class_of(path) for path in paths}
    images = sorted(path for path in directory.glob("*") if is_image_name(path.name))
    others = {_class_of(path): path for path in images if path.name not in mine}
    for name, path in others.items():
        if name in my_classes or _shared_facts(made_by_of(path)) != _shared_facts(made_by):
            raise UserError(
                f"{path}: made by another start with other weights or options, and scores count every image in a "
                "directory; remove it, or choose another --out"
            )


def _class_of(path: Path) -> str:
    return path.name.partition("_")[0]


def _shared_facts(made_by: str | None) -> dict[str, object] | None:
    """The facts that are equal for jobs that share a directory."""
    try:
        facts = parse_json(made_by or "null")
    except ValueError:  # somebody else's text
        return None
    if not isinstance(facts, dict):
        return None
    return {name: value for name, value in facts.items() if name not in ("classes", "seed")}
