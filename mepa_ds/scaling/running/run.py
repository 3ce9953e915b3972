"""Trains what is left of a set of planned runs on this machine, a few at a time: `mepa scale run`, `mepa ablate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.interrupts import Interrupted
from mepa_ds.safety.text import printable
from mepa_ds.scaling.running.learning_rates import replan_after_sweep
from mepa_ds.scaling.running.members import Member, member_of, set_stale_aside
from mepa_ds.scaling.running.workers import Worker, last_lines, slots, start
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import check_directory, make_plan, read_plan, write_plan

_LOOK_SECONDS = 0.5
_MOST_FAILURES_IN_A_ROW = 3
_STARTUP_SHARE = 0.1  # what a start takes, as a share of the mean run, for the estimate of the time left


def _never(members: Iterable[Member]) -> bool:
    return False


@dataclass(frozen=True)
class Fleet:
    """Runs that were planned together."""

    name: str
    output_dir: Path
    ranks: int
    """Processes of each run."""
    rows: Callable[[], list[dict[str, Any]]]
    """Reads the plan: a row for each run."""
    replan: Callable[[Iterable[Member]], bool] = _never
    """Writes a new plan if how the runs are doing asks for one; says whether it has."""

    def members(self) -> list[Member]:
        """Looks at every run."""
        return [member_of(row) for row in self.rows()]


class FleetRunner:
    """Runs what is left of a fleet. A run that fails is not tried again by the same runner, only by the next one."""

    def __init__(self, fleet: Fleet, jobs: int):
        if jobs < 1:
            raise UserError(f"--jobs {jobs}: expected at least 1")
        self._fleet = fleet
        self._rows = fleet.rows()
        self._members = {row["run"]: member_of(row) for row in self._rows}
        self._slots = slots(jobs, fleet.ranks)
        self._workers: dict[str, Worker] = {}
        self._tried: set[str] = set()
        self._failures_in_a_row = 0

    def run(self) -> dict[str, Member]:
        """Runs to the end and returns how each run is doing then.

        Raises:
            UserError: the first runs all failed, so something is wrong with all of them.
            Interrupted: this process was asked to stop; the runs have saved by then.
        """
        bar = tqdm(total=100.0, desc=printable(self._fleet.name), unit="%", disable=None, bar_format=_BAR)
        try:
            while True:
                self._look()
                self._collect_ended()
                if self._fleet.replan(self._members.values()):
                    self._rows = self._fleet.rows()
                    self._members = {row["run"]: member_of(row) for row in self._rows}
                self._fill_slots()
                _show(bar, self._members.values())
                if not self._workers and not any(m.state == "running" for m in self._members.values()):
                    return self._members
                time.sleep(_LOOK_SECONDS)
        except (Interrupted, UserError):
            self._stop_all()
            raise
        finally:
            bar.close()

    def _look(self) -> None:
        """Looks again at the runs that can have changed: those at work, here or elsewhere, and those that wait."""
        for name, member in self._members.items():
            if name in self._workers or member.state in ("running", "waiting"):
                self._members[name] = member_of(member.row)

    def _collect_ended(self) -> None:
        for name, worker in list(self._workers.items()):
            status = worker.ended()
            if status is None:
                continue
            del self._workers[name]
            self._slots.append(worker.slot)
            self._members[name] = member = member_of(self._members[name].row)
            if member.state == "finished":
                self._failures_in_a_row = 0
                done = sum(other.state == "finished" for other in self._members.values())
                log.note(f"{name}: finished, {done} of {len(self._members)} runs done")
            elif member.state == "diverged":
                log.note(f"{name}: diverged at step {member.step}, not run again")
            else:
                told = last_lines(worker.log)
                self._note_failure(f"{name}: ended with status {status}; {worker.log} says\n  {told}")

    def _note_failure(self, line: str) -> None:
        log.note(line)
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= _MOST_FAILURES_IN_A_ROW:
            raise UserError(
                f"{self._fleet.name}: {self._failures_in_a_row} runs in a row have failed; mend that (the last "
                "messages are above) and run again: what is finished is kept"
            )

    def _fill_slots(self) -> None:
        startable = ("planned", "stopped", "failed")
        left = [m for m in self._members.values() if m.state in startable and m.name not in self._tried]
        trunks = {row["branches_off"] for row in self._rows}
        # The longest first, so that all slots end together; what others wait for before everything else.
        left.sort(key=lambda m: (m.name in trunks or m.row["role"] == "lr", m.row["paid_flops"]), reverse=True)
        for member in left[: len(self._slots)]:
            self._tried.add(member.name)
            set_stale_aside(member.row)
            output = log_path(self._fleet, member.name)
            recipe = Path(member.row["recipe"])
            self._workers[member.name] = start(member.name, recipe, self._slots.pop(0), self._fleet.ranks, output)

    def _stop_all(self) -> None:
        """Asks all runs to save, and waits until they have."""
        for worker in self._workers.values():
            worker.stop()
        for worker in self._workers.values():
            worker.process.wait()
            worker.ended()


def log_path(fleet: Fleet, name: str) -> Path:
    """What a run says goes there."""
    return fleet.output_dir / "logs" / f"{name}.log"


_BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"


def _show(bar: Any, members: Iterable[Member]) -> None:
    """Moves the progress bar, whose unit is a hundredth of the FLOPs and starts of all runs."""
    found = list(members)
    mean = sum(m.row["paid_flops"] for m in found) / len(found)
    weights = [m.row["paid_flops"] + _STARTUP_SHARE * mean for m in found]
    ended = {"finished", "diverged"}
    done = sum(w * (1.0 if m.state in ended else m.share) for w, m in zip(weights, found, strict=True))
    share = 100 * done / sum(weights)
    if bar.n == 0:
        bar.initial = bar.n = share  # what earlier starts did is no measure of the speed
    bar.update(share - bar.n)
    counts = {state: sum(m.state == state for m in found) for state in ("finished", "running", "failed", "diverged")}
    bar.set_postfix_str(", ".join(f"{count} {state}" for state, count in counts.items() if count), refresh=False)


def fleet_of(study: StudyConfig) -> Fleet:
    """The runs of a scaling study that is planned."""
    return Fleet(
        study.name,
        study.output_dir,
        study.budget.ranks,
        rows=lambda: read_plan(study),
        replan=lambda members: replan_after_sweep(study, members),
    )


def plan_if_needed(study: StudyConfig) -> None:
    """Writes the plan unless the study's output_dir has this very plan."""
    check_directory(study)
    with suppress(UserError):
        read_plan(study)
        return
    plan = make_plan(study)
    for line in plan.warnings:
        log.note(f"warning: {line}")
    write_plan(plan)
