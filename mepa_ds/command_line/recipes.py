"""Command lines of the form `TOOL RECIPE [key=value ...]`."""

from __future__ import annotations

import argparse

from mepa_ds import shipped
from mepa_ds.command_line.paths import path_argument
from mepa_ds.config.base import ConfigT, describe, load_config


def read_recipe(argv: list[str], prog: str, description: str, config_type: type[ConfigT]) -> ConfigT:
    """Parses the command line and the recipe it names; `--help` lists every key of the recipe."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="keys of the recipe, each also an override:\n" + "\n".join(describe(config_type)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=path_argument, help="YAML file; those of recipes/ are found from any directory")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as train.steps=100 optim.base_lr=3e-4"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the `deepspeed` launcher adds it
    arguments = parser.parse_args(argv)
    return load_config(config_type, shipped.find(arguments.recipe), arguments.overrides)
