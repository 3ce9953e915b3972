"""The records in metrics.jsonl: means since the last record, and routing and timing of the step at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mepa_ds import distributed
from mepa_ds.models.moe.routing import RoutingStatistics
from mepa_ds.objective import flops
from mepa_ds.objective.reports import reduce_losses, routing_report
from mepa_ds.pretrain.recording.detectors import (
    COLLAPSED_STEPS,
    SLOW_RANK_RATIO,
    SLOW_RANK_RECORDS,
    CollapseDetector,
    SlowRankDetector,
    SpikeDetector,
)
from mepa_ds.pretrain.recording.report import StepClock, StepReport
from mepa_ds.pretrain.recording.window import Window
from mepa_ds.runtime.recorder import Recorder, peak_memory_bytes
from mepa_ds.scales import ScaleSchedule

# Ranks are compared by these parts of a step's seconds, and by the most memory used.
# "data" is the time until all ranks have a batch, and "loader" is this rank's own part of it. "all_to_all" is the wait
# for travelling tokens, within forward and backward. "own" is loader, inputs and forward without the waits for other
# ranks, so that a slow rank shows in its own time and not in its peers' times.
_PARTS = ("step", "data", "loader", "inputs", "forward", "backward", "optimizer", "all_to_all", "own")
_DAMAGE_SHOWN = 100


class StepMetrics:
    """Gathers the metrics of steps. Every rank makes one, since numbers are reduced over ranks; the main rank writes.

    `window` has the sums that a checkpoint stored between two records (`cut`). `step_flops` gives the FLOPs of a step
    by the number of scales it trains. `peak_flops` is FLOPs per second of one device, None if unknown.
    `guided` are the scales of objective.alignment.
    """

    def __init__(
        self,
        recorder: Recorder,
        window: dict[str, Any],
        schedule: ScaleSchedule,
        global_batch: int,
        step_flops: Callable[[int], float],
        peak_flops: float | None,
        guided: Sequence[int] = (),
    ):
        self._recorder, self._schedule, self._global_batch = recorder, schedule, global_batch
        self._step_flops, self._peak_flops, self._guided = step_flops, peak_flops, set(guided)
        self._window = Window(window)
        self._speed = _Speed()
        self._is_spike = SpikeDetector(recorder.past_losses())
        self._collapsed = CollapseDetector()
        self._slow_rank = SlowRankDetector()
        self._noted: list[int] = []
        """Applied steps whose losses have not been checked for spikes yet."""

    def note(self, report: StepReport) -> None:
        """Notes every step. Its losses stay on the device until a record is due, so that no spike is missed."""
        tokens = self._global_batch * self._schedule.bounds[report.num_scales - 1][1]
        flops_done = self._step_flops(report.num_scales)
        self._speed.add(self._global_batch, tokens, flops_done, report.clock.total)
        self._window.note(report)
        if report.applied:
            self._noted.append(report.step)

    def restart(self, window: dict[str, Any]) -> None:
        """Starts again from `window` after a rollback, because the steps since the last record are trained again."""
        self._window.restart(window)
        self._speed = _Speed()
        self._noted.clear()

    def cut(self) -> dict[str, Any]:
        """Returns the sums since the last record for a checkpoint; a resumed run continues from them. Collective."""
        kept, losses = self._window.reduce()
        self._look_for_spikes(losses)
        return kept

    def write(self, report: StepReport, place: dict[str, float], damaged: list[str], loader_seconds: float) -> float:
        """Reduces the numbers over the ranks and records them; returns the mean cross-entropy. Collective.

        Args:
            place: how far the run is, as epoch, images, skipped steps and replaced samples.
            damaged: what was wrong with the samples that were replaced, on all ranks.
            loader_seconds: this rank's own part of the wait for data in this step.
        """
        seconds = _seconds_by_part(report.clock, loader_seconds)
        own_terms, _, routing = reduce_losses(report.losses)
        _, losses = self._window.reduce()
        means = self._window.means(list(own_terms), self._schedule.num_scales)
        speed, self._speed = self._speed, _Speed()
        ranks = _compare_ranks([*seconds.values(), float(peak_memory_bytes())])
        values: dict[str, Any] = {
            **place,
            "lr": report.lr,
            "scales": report.num_scales,
            "applied": report.applied,
            **means,
            **self._worth_watching(means, report.num_scales, routing),
            "step_loss": own_terms["total"],
            **{f"{part}_seconds": value for part, value in seconds.items()},
            **speed.means(),
            "peak_memory_bytes": int(ranks.pop("peak_memory_bytes")["max"]),
            "ranks": ranks,
        }
        if self._peak_flops is not None:
            values["mfu"] = flops.mfu(speed.flops, speed.seconds, self._peak_flops, distributed.world_size())
        self._recorder.training(report.step, values)
        if damaged:
            facts = {"count": len(damaged), "damage": damaged[:_DAMAGE_SHOWN]}
            self._recorder.record("damaged_sample", report.step, facts)
        self._look_for_spikes(losses)
        self._look_for_a_slow_rank(report.step, ranks["own_seconds"])
        if routing:
            self._record_routing(report.step, routing)
        return float(values["ce"])

    def _worth_watching(
        self, means: dict[str, Any], num_scales: int, routing: dict[int, RoutingStatistics]
    ) -> dict[str, float]:
        """Returns numbers that say at a glance how guidance and routing are doing; none for a run without them.

        `guidance_cosine` is the mean cosine over scales and patches. `max_expert_share` is the largest share of the
        routed pairs of a layer that one expert of it got, in the step of the record.
        """
        watched = {}
        num_guided = sum(scale <= num_scales for scale in self._guided)
        if num_guided and means.get("alignment"):  # exactly 0: not computed any more (alignment.until)
            watched["guidance_cosine"] = -means["alignment"] / num_guided
        if routing:
            counts_NE = torch.stack([statistics.counts_SE.sum(0) for statistics in routing.values()])
            share_NE = counts_NE / counts_NE.sum(1, keepdim=True).clamp_min(1)
            watched["max_expert_share"] = share_NE.max().item()  # one wait for a GPU, not one a layer
        return watched

    def _record_routing(self, step: int, routing: dict[int, RoutingStatistics]) -> None:
        layers = {str(layer): routing_report(statistics) for layer, statistics in routing.items()}
        collapsed = self._collapsed(step, layers)
        self._recorder.record("routing", step, {"layers": layers, "collapsed_experts": len(collapsed)})
        if collapsed:
            line = (
                f"experts (block.expert) with next to no load at every record of {COLLAPSED_STEPS} steps: "
                f"{', '.join(collapsed)}"
            )
            self._recorder.warn("collapsed_experts", step, line, experts=collapsed)

    def _look_for_spikes(self, losses: list[float]) -> None:
        """Warns of loss spikes. `losses` has one loss for each step noted since the last call."""
        steps, self._noted = self._noted, []
        for step, loss in zip(steps, losses, strict=True):
            if self._is_spike(loss):
                line = f"the loss of {loss:.4f} is far above the recent ones"
                self._recorder.warn("loss_spike", step, line, loss=loss)

    def _look_for_a_slow_rank(self, step: int, own_seconds: dict[str, float]) -> None:
        slow = self._slow_rank(own_seconds)
        if slow is not None:
            line = (
                f"rank {slow} takes more than {SLOW_RANK_RATIO:g} times as long as the fastest rank to load and to "
                f"compute, in {SLOW_RANK_RECORDS} records running: all others wait for it"
            )
            self._recorder.warn("slow_rank", step, line, rank=slow, **own_seconds)


def _seconds_by_part(clock: StepClock, loader: float) -> dict[str, float]:
    """Returns this rank's seconds in the order of `_PARTS`."""
    seconds, waits = clock.seconds, clock.waits
    parts = {
        **seconds,
        "step": clock.total,
        "loader": loader,
        "all_to_all": clock.tokens_waited,
        "own": loader + seconds["inputs"] + seconds["forward"] - waits["forward"],
    }
    return {part: parts[part] for part in _PARTS}


@dataclass
class _Speed:
    """The work and the wall-clock time of the steps since the last record, or since this start.

    The time of evaluations, checkpoints and pictures between steps does not count.
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
    """Returns each number's smallest and largest value over the ranks, and the rank of the largest. Collective."""
    device = "cuda" if distributed.uses_gpu() else "cpu"
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
