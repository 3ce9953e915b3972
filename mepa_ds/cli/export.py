"""`mepa export`: a checkpoint's weights for use anywhere, without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class ExportOptions:
    """Writes a training checkpoint's fp32 weights as safetensors + config.json (Hugging Face layout)."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint directory: <output_dir>/checkpoints/step_00001000."""
    directory: tyro.conf.Positional[Path]
    """Where the weights go; `mepa sample --weights` and `NextScaleTransformer.load` read it."""


def main(argv: list[str]) -> None:
    options = tyro.cli(ExportOptions, prog="mepa export", args=argv)
    from mepa_ds.engine.checkpoint import export_checkpoint

    export_checkpoint(options.checkpoint, options.directory)
    print(f"weights of {options.checkpoint} in {options.directory}")
