"""`mepa init`: from a folder of images to recipes and commands for them, and with --run to a trained model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.errors import UserError


@dataclass
class InitOptions:
    """Looks at images, chooses everything for the machine and the time, and writes a project: tokenizer.yaml and
    pretrain.yaml with the reason of each value, commands.sh, and project.json.

    mepa init FOLDER --out my --run: does all of it, too. Stopped and started again, it goes on.
    """

    source: tyro.conf.Positional[str]
    """A folder of class folders, with or without a split (train/ and val/, or test, validation, heldout); a folder of
    images (one class); a shard set, or a folder of train/ and heldout/ sets; or `digits`, scikit-learn's."""
    out: Path
    """Directory of the project, new or empty; all of its data and runs go there."""
    minutes: float | None = None
    """How long all stages together may take [default: 12 on a CPU; as long as is published on GPUs]."""
    gpus: int | None = None
    """GPUs to train on, here or on another machine; 0: the CPU [default: those that are here]."""
    memory: float | None = None
    """GB of one GPU [default: that of the GPU that is here, else 80]."""
    side: int | None = None
    """Pixels of the generated images: 32, 64, or on GPUs 128 or 256 [default: by the images and the machine]."""
    teacher: Literal["none", "patch-pca", "contrastive", "dinov2-b"] | None = None
    """What semantic guidance follows [default: patch-pca, which is fitted in seconds; dinov2-b for photos on GPUs]."""
    run: bool = False
    """Also run all commands, with one progress display; what is done already is skipped."""

    def check(self) -> None:
        """Raises UserError for numbers that make no sense."""
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"--minutes: expected more than 0, got {self.minutes:g}; leave it out for the default")
        if self.gpus is not None and self.gpus < 0:
            raise UserError(f"--gpus: expected 0 or more, got {self.gpus}")
        if self.memory is not None and self.memory <= 0:
            raise UserError(f"--memory: expected the GB of one GPU, got {self.memory:g}")


def main(argv: list[str]) -> None:
    options = tyro.cli(InitOptions, prog="mepa init", args=argv)
    options.check()
    log.make_stdout_a_log()
    if options.run and options.gpus:
        import torch

        if (here := torch.cuda.device_count()) < options.gpus:
            raise UserError(
                f"--gpus {options.gpus}: --run trains on this machine, which has {here}; leave --run out, and run "
                "commands.sh where the GPUs are"
            )
    from mepa_ds.project.making import make_project
    from mepa_ds.project.running import run_project

    images, chosen, layout = make_project(
        options.out,
        options.source,
        {name: getattr(options, name) for name in ("minutes", "gpus", "memory", "side", "teacher")},
    )
    if options.run:
        run_project(images, chosen, layout, options.out, "mepa init")
    else:
        log.say(f"\nnext:     the same command with --run, or the commands in {options.out}/commands.sh")


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
