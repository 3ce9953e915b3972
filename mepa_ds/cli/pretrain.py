"""`python pretrain.py RECIPE [key=value ...]`, alone or under any launcher."""

from __future__ import annotations

import sys

from mepa_ds.cli.recipes import read_recipe
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.loops.stopping import REQUEUE_EXIT_CODE, StopRequests

DESCRIPTION = """Pretrains a model by a recipe, or resumes the run in its output_dir.

one process   python pretrain.py recipes/quickstart.yaml
two ranks     torchrun --nproc-per-node 2 pretrain.py recipes/quickstart.yaml parallel.ep_size=2
DeepSpeed     deepspeed --num_gpus 8 pretrain.py recipes/mepa_d16.yaml
srun          srun python pretrain.py recipes/mepa_d16.yaml     (MASTER_ADDR and MASTER_PORT set)

SIGUSR1 or SIGTERM on any rank: the step ends, all ranks save a checkpoint and exit with status 75, which means "start
me again" (torchrun turns it into 1: see "state" in output_dir/status.json). A second signal exits at once.

exit status   0 finished; 75 stopped, start again to go on; 2 something in the recipe or the data is wrong
"""


def main(argv: list[str]) -> None:
    config = read_recipe(argv, "pretrain.py", DESCRIPTION, PretrainConfig)
    requests = StopRequests()
    from mepa_ds.loops.pretraining import pretrain  # DeepSpeed is slow to import: not before the recipe is valid

    if not pretrain(config, requests):
        sys.exit(REQUEUE_EXIT_CODE)
