"""The start of a run: prepares its output directory and writes the record `start`."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mepa_ds import distributed
from mepa_ds.checkpoint.files import check_exports, clean
from mepa_ds.checkpoint.state import versions
from mepa_ds.config.changes import changes_in_words
from mepa_ds.config.pretrain import LogConfig, PretrainConfig
from mepa_ds.engine import deepspeed_config
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.engine.lean_start import NothingDrawn
from mepa_ds.machine import cpu_name
from mepa_ds.models.summary import count_parameters
from mepa_ds.objective.flops import step_flops
from mepa_ds.runtime.output import owned
from mepa_ds.runtime.recorder import Recorder
from mepa_ds.runtime.stopping import JOB_END
from mepa_ds.runtime.trackers.opening import check_packages

EXPORTS = ("best", "last", "last_ema")
"""Directories of exported weights in output_dir."""


@contextmanager
def prepared_output(output_dir: Path, log: LogConfig) -> Iterator[None]:
    """Holds the output directory for this run within the context, and removes a killed run's leftovers. Collective.

    Raises:
        UserError: on every rank, when the main rank cannot write to the directory, another rank does not see it, or
            another start is working in it, or something there has the name of what a run writes, and is not a run's.
    """

    def prepare() -> None:
        check_packages(log)
        check_exports(output_dir, EXPORTS)
        clean(output_dir)
        clean(output_dir / "checkpoints")

    with owned(output_dir, prepare):
        yield


def record_start(
    recorder: Recorder,
    step: int,
    config: PretrainConfig,
    engine: PretrainEngine,
    teacher_width: int | None,
    facts: dict[str, Any],
    changes: dict[str, list[Any]],
) -> None:
    """Records and prints how the run starts.

    `facts` are the run's own numbers: num_steps, num_samples and further entries of the record. `changes` are the
    changes of the recipe since the checkpoint from which the run continues.
    """
    with NothingDrawn():
        counts = count_parameters(config.model)
    projector = engine.objective.projector
    head = sum(parameter.numel() for parameter in projector.parameters()) if projector is not None else 0
    world_size, ep_size = distributed.world_size(), config.parallel.ep_size
    zero_stage, precision = deepspeed_config.zero_stage(config.parallel.deepspeed), config.parallel.precision
    values = {
        "world_size": world_size,
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else cpu_name(),
        "ep_size": ep_size,
        "zero_stage": zero_stage,
        "precision": precision,
        "total_parameters": counts.total,
        "active_parameters": counts.active,
        "projector_parameters": head,
        "step_flops": step_flops(config, teacher_width),
        "versions": _environment(),
        **facts,
    }
    recorder.record("start", step, values)
    recorder.say(
        f"model: {counts}, guidance projector {head / 1e6:.1f}M apart; {world_size} ranks, ep_size {ep_size}, "
        f"ZeRO-{zero_stage}, {precision}; {facts['num_steps']} steps of {config.train.global_batch} images, "
        f"{facts['num_samples']} images an epoch"
    )
    if changes:
        recorder.record("recipe_changed", step, {"changes": changes})
        recorder.say(changes_in_words(changes))
    if config.guards.stop_before_end is not None and JOB_END not in os.environ:
        line = f"guards.stop_before_end: {JOB_END} is not set, so it cannot stop the run; set guards.time_limit"
        recorder.warn("no_job_end", step, line)


def _environment() -> dict[str, str]:
    """Versions of what the run stands on."""
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda and distributed.uses_gpu() else {}
    return {**versions(), "python": platform.python_version(), **cuda}
