"""`mepa train-tokenizer RECIPE [key=value ...]`: trains a multi-scale VQVAE on shards of images."""

from __future__ import annotations

import sys

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.command_line.recipes import read_recipe
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.runtime.stopping import REQUEUE_EXIT_CODE, StopRequests

DESCRIPTION = """Trains a multi-scale VQVAE by a recipe such as recipes/tokenizer_quickstart.yaml, or resumes the run in
its output_dir. Runs alone, under torchrun, or from srun's variables.

Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP on any rank: the step ends, the run is saved, and all ranks exit with status 75,
which means "start me again" (torchrun turns it into 1: see "state" in output_dir/status.json). A second one, a second
later or more, exits at once.
"""


def main(argv: list[str]) -> None:
    config = read_recipe(argv, "mepa train-tokenizer", DESCRIPTION, TokenizerTrainingConfig)
    log.make_stdout_a_log()
    requests = StopRequests()
    from mepa_ds.runtime.failures import reporting
    from mepa_ds.train_tokenizer.loop import train_tokenizer

    if not reporting(config.output_dir, lambda: train_tokenizer(config, requests)):
        sys.exit(REQUEUE_EXIT_CODE)


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
