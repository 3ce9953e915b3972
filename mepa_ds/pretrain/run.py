"""`pretrain` checks everything that can be checked, then trains. Start reading here."""

from __future__ import annotations

import os

from mepa_ds import distributed
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.engine import deepspeed_config
from mepa_ds.errors import UserError
from mepa_ds.precision import refusal
from mepa_ds.pretrain.data import open_checked
from mepa_ds.pretrain.start import prepared_output
from mepa_ds.pretrain.trainer import PretrainRun
from mepa_ds.runtime.failures import reporting
from mepa_ds.runtime.stopping import StopRequests, deadline, undisturbed


def pretrain(config: PretrainConfig, requests: StopRequests) -> bool:
    """Runs or resumes the recipe on all ranks that the launcher started. Collective.

    Returns whether the run is finished. If it is not, a signal or a time limit has stopped it, and it has been saved.

    Raises UserError, on every rank and before any training, when the recipe does not fit the data or the ranks.
    """
    launch = distributed.read_launch()
    requests.stop_at(deadline(config.guards.time_limit, config.guards.stop_before_end, os.environ))

    def run_to_the_end() -> bool:
        config.check_world(launch.world_size)
        deepspeed_config.read_knobs(config.parallel.deepspeed)
        with undisturbed():
            device = distributed.start(launch)
        distributed.agree(refusal(config.parallel.precision, device))
        sets = open_checked(config)
        with prepared_output(config.output_dir, config.log):
            run = PretrainRun(config, sets, device, requests)
            run.resume()
            try:
                return run.train()
            except UserError as error:
                if error.agreed or launch.world_size == 1:  # all ranks come here, so writes can be finished
                    run.settle()
                raise

    return reporting(config.output_dir, run_to_the_end)
