"""`python pretrain.py RECIPE [key=value ...]`, alone or under any launcher."""

from __future__ import annotations

import argparse
import sys

from mepa_ds import distributed, log
from mepa_ds.command_line import entry
from mepa_ds.command_line.recipes import read_recipe
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.runtime.stopping import REQUEUE_EXIT_CODE, StopRequests

DESCRIPTION = """Pretrains a model by a recipe, or resumes the run in its output_dir.

one process   python pretrain.py recipes/quickstart.yaml parallel.ep_size=1
two ranks     torchrun --nproc-per-node 2 pretrain.py recipes/quickstart.yaml
DeepSpeed     deepspeed --num_gpus 8 pretrain.py recipes/mepa_d16.yaml
srun          srun python pretrain.py recipes/mepa_d16.yaml     (MASTER_ADDR and MASTER_PORT set)

--dry-run [--world-size N] [--memory GB] [--num-samples N]
              prints the plan and trains nothing: parameters, FLOPs, memory a rank by part, bytes exchanged, checkpoint
              size, steps, and what would not fit in GB of memory a rank. Needs neither data nor GPUs; shard sets that
              are there are checked against the recipe and each other. By default the number of ranks is that of this
              launch, GB is this machine's memory, and the samples are counted in data.tokens if that set is there.

Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP on any rank: the step ends, all ranks save a checkpoint and exit with status 75,
which means "start me again" (torchrun turns it into 1: see "state" in output_dir/status.json). A second one, a second
later or more, exits at once.

exit status   0 finished; 75 stopped, start again to continue; 2 something in the recipe or the data is wrong;
              124 no step for guards.hang_timeout seconds; 1 a crash
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--memory", type=float)
    parser.add_argument("--num-samples", type=int)
    options, rest = parser.parse_known_args(argv)
    config = read_recipe(rest, "pretrain.py", DESCRIPTION, PretrainConfig)
    if options.dry_run:
        _dry_run(config, options)
        return
    if any(value is not None for value in (options.world_size, options.memory, options.num_samples)):
        parser.error("--world-size, --memory and --num-samples belong to --dry-run")
    log.make_stdout_a_log()
    requests = StopRequests()
    from mepa_ds.pretrain.run import pretrain  # DeepSpeed is slow to import: not before the recipe is valid

    if not pretrain(config, requests):
        sys.exit(REQUEUE_EXIT_CODE)


def _dry_run(config: PretrainConfig, options: argparse.Namespace) -> None:
    from mepa_ds.planning.plan import format_plan, plan_run, this_machine
    from mepa_ds.pretrain.data import check_made_sets

    world_size = options.world_size or distributed.read_launch().world_size
    config.check_world(world_size)
    check_made_sets(config)
    machine = this_machine(config, world_size, None if options.memory is None else options.memory * 1e9)
    if distributed.read_launch().is_main:
        log.say(format_plan(plan_run(config, machine, options.num_samples)))


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
