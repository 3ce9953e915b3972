"""What a record in metrics.jsonl holds: means since the last one, and of the step at its end routing and timing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mepa_ds import distributed
from mepa_ds.checkpoint.files import RunState
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.training import TrainingBatch
from mepa_ds.engine.engine import StepReport
from mepa_ds.objective import flops
from mepa_ds.objective.reports import reduce_losses, routing_report
from mepa_ds.pretrain.data import Loader
from mepa_ds.pretrain.detectors import (
    COLLAPSED_STEPS,
    SLOW_RANK_RATIO,
    SLOW_RANK_RECORDS,
    CollapseDetector,
    SlowRankDetector,
    SpikeDetector,
)
from mepa_ds.pretrain.window import Window
from mepa_ds.runtime.recorder import Recorder, peak_memory_bytes

# Seconds of a step, by part, and the most memory used: what ranks are compared by.
# "data" is the time until all ranks have a batch, "loader" this rank's own part of it; "all_to_all" is the wait for
# tokens that travel, within forward and backward; "own" is loader, inputs and forward less all waiting for other ranks,
# so that a slow rank shows up there and not in its peers' times.
_PARTS = ("step", "data", "loader", "inputs", "forward", "backward", "optimizer", "all_to_all", "own")
_DAMAGE_SHOWN = 100


class StepRecords:
    """Made on every rank; the main rank's recorder writes."""

    def __init__(
        self,
        config: PretrainConfig,
        num_samples: int,
        teacher_width: int | None,
        recorder: Recorder | None,
        window: dict[str, Any],
    ):
        self._config, self._num_samples, self._recorder = config, num_samples, recorder
        self._window = Window(window)
        self._speed = _Speed()
        self._is_spike = SpikeDetector(recorder.past_losses() if recorder else ())
        self._collapsed = CollapseDetector()
        self._slow_rank = SlowRankDetector()
        self._noted: list[int] = []
        self._teacher_width = teacher_width
        self._peak = flops.peak_flops_per_second(config.parallel.precision)
        self._started = self._data = self._loader = self._step = 0.0

    def take(self, batches: Iterator[TrainingBatch], loader: Loader) -> list[TrainingBatch]:
        """The micro-batches of the step that begins here: `batches` gives those of `loader` when all ranks have one."""
        self._started, waited = time.perf_counter(), loader.seconds
        taken = list(itertools.islice(batches, self._config.train.accumulation))
        self._data, self._loader = time.perf_counter() - self._started, loader.seconds - waited
        return taken

    def note(self, step: int, report: StepReport, num_scales: int) -> None:
        """After every step: its losses stay on the device until a record is due, so that no spike goes unseen."""
        self._step = time.perf_counter() - self._started
        images, model = self._config.train.global_batch, self._config.model
        step_flops = flops.step_flops(self._config, self._teacher_width, num_scales)
        self._speed.add(images, images * model.schedule.bounds[num_scales - 1][1], step_flops, self._step)
        self._window.note(report)
        if report.applied:
            self._noted.append(step)

    def restart(self, window: dict[str, Any]) -> None:
        """After a rollback: the steps since the last record are taken again."""
        self._window.restart(window)
        self._speed = _Speed()
        self._noted.clear()

    def cut(self) -> dict[str, Any]:
        """The sums since the last record, for a checkpoint: the record goes on from them. Collective."""
        kept, losses = self._window.reduce()
        self._watch(losses)
        return kept

    def write(
        self, state: RunState, report: StepReport, lr: float, num_scales: int, loader: Loader, skipped_steps: int
    ) -> None:
        """Reduces the numbers over the ranks and writes them. Collective."""
        parts = {**report.seconds, "step": self._step}
        parts |= {"data": self._data, "loader": self._loader}
        parts["own"] = parts["loader"] + parts["inputs"] + parts["forward"] - parts["forward_waiting"]
        own_terms, _, routing = reduce_losses(report.losses)
        _, losses = self._window.reduce()
        means = self._window.means(list(own_terms), self._config.model.schedule.num_scales)
        speed, self._speed = self._speed, _Speed()
        ranks = _compare_ranks([parts.get(part, 0.0) for part in _PARTS] + [float(peak_memory_bytes())])
        damaged = loader.take_damaged()
        state.replaced_samples += len(damaged)
        if self._recorder is None:
            self._noted.clear()
            return
        values: dict[str, Any] = {
            "epoch": state.position / self._num_samples,
            "images": state.position,
            "lr": lr,
            "scales": num_scales,
            "applied": report.applied,
            "skipped_steps": skipped_steps,
            "replaced_samples": state.replaced_samples,
            **means,
            "step_loss": own_terms["total"],
            **{f"{part}_seconds": parts.get(part, 0.0) for part in _PARTS},
            **speed.means(),
            "peak_memory_bytes": int(ranks.pop("peak_memory_bytes")["max"]),
            "ranks": ranks,
        }
        slow = self._slow_rank(ranks["own_seconds"])
        if self._peak is not None:
            values["mfu"] = flops.mfu(speed.flops, speed.seconds, self._peak, distributed.world_size())
        self._recorder.training(state.step, values)
        if damaged:
            facts = {"count": len(damaged), "damage": damaged[:_DAMAGE_SHOWN]}
            self._recorder.record("damaged_sample", state.step, facts)
        self._watch(losses)
        if slow is not None:
            line = (
                f"rank {slow} takes more than {SLOW_RANK_RATIO:g} times as long as the fastest rank to load and to "
                f"compute, in {SLOW_RANK_RECORDS} records running: all others wait for it"
            )
            self._recorder.warn("slow_rank", state.step, line, rank=slow, **ranks["own_seconds"])
        if routing:
            layers = {str(layer): routing_report(statistics) for layer, statistics in routing.items()}
            collapsed = self._collapsed(state.step, layers)
            self._recorder.record("routing", state.step, {"layers": layers, "collapsed_experts": len(collapsed)})
            if collapsed:
                line = (
                    f"experts (block.expert) with next to no load at every record of {COLLAPSED_STEPS} steps: "
                    f"{', '.join(collapsed)}"
                )
                self._recorder.warn("collapsed_experts", state.step, line, experts=collapsed)

    def _watch(self, losses: list[float]) -> None:
        """`losses` of the steps noted since the last call."""
        steps, self._noted = self._noted, []
        if self._recorder is None:
            return
        for step, loss in zip(steps, losses, strict=True):
            if self._is_spike(loss):
                line = f"the loss of {loss:.4f} is far above the recent ones"
                self._recorder.warn("loss_spike", step, line, loss=loss)


@dataclass
class _Speed:
    """Since the last record, or this start: what steps did, and the wall clock of these steps alone.

    Evaluations, checkpoints and pictures between them do not count.
    """

    steps: int = 0
    images: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, images: int, tokens: int, step_flops: float, seconds: float) -> None:
        self.steps += 1
        self.images += images
        self.tokens += tokens
        self.flops += step_flops
        self.seconds += seconds

    def means(self) -> dict[str, float]:
        return {
            "mean_step_seconds": self.seconds / self.steps,
            "images_per_second": self.images / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "flops_per_second": self.flops / self.seconds,
        }


def _compare_ranks(mine: list[float]) -> dict[str, dict[str, float]]:
    """Each number's smallest and largest value over the ranks, and the rank of the largest. Collective."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = torch.zeros(distributed.world_size(), len(mine), device=device, dtype=torch.float32)
    table[distributed.rank()] = torch.tensor(mine, device=device)
    (table,) = distributed.sums_over_ranks([table])
    names = [f"{part}_seconds" for part in _PARTS] + ["peak_memory_bytes"]
    smallest, largest = table.min(0).values.tolist(), table.max(0)
    return {
        name: {"min": low, "max": high, "max_rank": rank}
        for name, low, high, rank in zip(
            names, smallest, largest.values.tolist(), largest.indices.tolist(), strict=True
        )
    }
