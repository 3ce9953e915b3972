"""Generated images of many jobs, packed into one file for evaluation suites.

classes WEIGHTS PARTS PART             the classes of one part, with commas between
merge WEIGHTS IMAGES PER_CLASS OUT SCORES REFERENCE INCEPTION
    OUT.npz with `arr_0`, uint8 (N, H, W, 3), as ADM's evaluation suite reads it, unless it is there; then SCORES, what
    `mepa evaluate` finds (-: nothing)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.images.sets import write_npz
from mepa_ds.safety.reading import read_json_object

_SEED = 0
_MOST_CLASSES = 10**6


def num_classes(weights: Path) -> int:
    """Classes of an exported model."""
    path = weights / "config.json"
    try:
        found = int(read_json_object(path)["num_classes"])
        if not 0 < found <= _MOST_CLASSES:
            raise ValueError(f"num_classes: {found}")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a model's config: {error}") from error


def classes_of_part(weights: Path, parts: int, part: int) -> list[int]:
    """Classes part, part + parts, ...: the sizes of all parts differ by one class at most."""
    return list(range(part, num_classes(weights), parts))


def pack(weights: Path, images: Path, per_class: int, out: Path) -> int:
    """Writes all images into `out`, in an order drawn with a fixed seed; returns their number.

    The suite's inception score is a mean over contiguous splits, and the suite does not shuffle: images in the order of
    their classes would score about a fifth of what they should.

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
    order = np.random.default_rng(_SEED).permutation(len(paths))
    write_npz(out, [paths[number] for number in order.tolist()])
    return len(paths)


def main(argv: Sequence[str]) -> None:
    action, weights, *rest = argv
    if action == "classes":
        log.answer(",".join(map(str, classes_of_part(Path(weights), int(rest[0]), int(rest[1])))))
        return
    images, per_class, out, scores, reference, inception = rest
    if not Path(out).exists():
        count = pack(Path(weights), Path(images), int(per_class), Path(out))
        log.say(f"{out}: {count} images as arr_0, {num_classes(Path(weights))} classes", flush=True)
    if scores != "-":
        from mepa_ds.evaluation.score_files import Comparison, score_files
        from mepa_ds.evaluation.scorer import ScorerOptions

        options = ScorerOptions(inception=Path(inception))
        score_files(Comparison(Path(out), Path(reference), options), Path(scores))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        log.note(f"error: {error}")
        sys.exit(2)
