"""`mepa evaluate`: FID, sFID, inception score, precision and recall of generated images."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mepa_ds.command_line import entry
from mepa_ds.errors import UserError


@dataclass
class EvaluateOptions:
    """Compares images with a reference by the protocol of ADM's evaluation suite. A GPU is used where there is one."""

    samples: tyro.conf.Positional[Path]
    """Images: an .npz with `arr_0` (uint8, N H W 3), or a directory of image files. Papers use 50 of each class."""
    reference: Path
    """Real images of the same size, in either form; ADM's VIRTUAL_imagenet256_labeled.npz brings its own statistics."""
    inception: Path
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth."""
    batch_size: int = 64
    """Images at a time."""
    order: Literal["shuffled", "file"] = "shuffled"
    """Order of the images in the splits of the inception score. file: as they come, as in ADM's suite, to check this
    program against that suite's published numbers."""
    json: Path | None = None
    """Also writes the scores to this file."""


def main(argv: list[str]) -> None:
    options = tyro.cli(EvaluateOptions, prog="mepa evaluate", args=argv)
    if options.batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1, got {options.batch_size}")
    from mepa_ds.evaluation.score_files import Comparison, score_files

    score_files(
        Comparison(options.samples, options.reference, options.inception, options.batch_size, options.order),
        options.json,
    )


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
