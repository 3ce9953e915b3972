"""`mepa train-tokenizer RECIPE [key=value ...]`: trains a multi-scale VQVAE on shards of images."""

from __future__ import annotations

import argparse
from pathlib import Path

from mepa_ds.config.base import describe, load_config
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig


def main(argv: list[str]) -> None:
    """Runs alone, under torchrun, or from srun's variables; running it again resumes."""
    parser = argparse.ArgumentParser(
        prog="mepa train-tokenizer",
        description=__doc__,
        epilog="keys of the recipe:\n" + "\n".join(describe(TokenizerTrainingConfig)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="YAML file, such as recipes/tokenizer_quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=100 optim.lr=3e-4")
    arguments = parser.parse_args(argv)
    config = load_config(TokenizerTrainingConfig, arguments.recipe, arguments.overrides)
    from mepa_ds.loops.tokenizer_training import train_tokenizer

    train_tokenizer(config)
