"""`mepa export`: a checkpoint's weights for use anywhere, without DeepSpeed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry


@dataclass
class ExportOptions:
    """Writes a training checkpoint's fp32 weights as safetensors + config.json (Hugging Face layout)."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint directory: <output_dir>/checkpoints/step_00001000."""
    directory: tyro.conf.Positional[Path]
    """Where the weights go; `mepa sample --weights` and `NextScaleTransformer.load` read it."""
    ema: bool = False
    """Export the average of the weights instead (for a run with optim.ema)."""


def main(argv: list[str]) -> None:
    options = tyro.cli(ExportOptions, prog="mepa export", args=argv)
    log.make_stdout_a_log()
    from mepa_ds.checkpoint.fragment import EMA, MASTER
    from mepa_ds.checkpoint.weights import export_checkpoint

    export_checkpoint(options.checkpoint, options.directory, EMA if options.ema else MASTER)
    print(f"weights of {options.checkpoint} in {options.directory}")


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
