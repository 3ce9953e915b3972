"""Times of a step's parts and of its waits, on a CPU and by a GPU's events."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from mepa_ds import distributed
from mepa_ds.engine.waiting import WaitingClock
from mepa_ds.pretrain.recording.report import StepClock


class Stream:
    """A GPU that gets to an event `now` seconds after its start. Events are not over before `synchronize`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.synchronized = 0

    def event(self, enable_timing: bool) -> Any:
        stream = self

        class Event:
            def record(self) -> None:
                self.at = stream.now

            def elapsed_time(self, other: Any) -> float:
                assert stream.synchronized, "the events are not over"
                return 1000 * (other.at - self.at)

        return Event()

    def synchronize(self) -> None:
        self.synchronized += 1


def test_a_gpus_parts_are_timed_without_waiting_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr(distributed, "uses_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "synchronize", stream.synchronize)
    waits = WaitingClock()
    waits.start(True)
    clock = StepClock(True, waits)
    for part, seconds, waited in (("data", 1.0, 0.0), ("forward", 4.0, 0.5), ("backward", 8.0, 2.0)) * 2:
        stream.now += seconds - waited
        for kind, share in (("all_to_all", 0.5), ("counts", 0.5)):
            with waits.waiting(kind):
                stream.now += share * waited
        clock.lap(part)
    assert stream.synchronized == 0
    clock.stop()
    assert stream.synchronized == 1
    assert clock.seconds == {"data": 2.0, "forward": 8.0, "backward": 16.0}
    assert clock.waits == {"data": 0.0, "forward": 1.0, "backward": 4.0}
    assert clock.tokens_waited == 2.5
    assert 0 < clock.total < 1, "the step's own time is that of the wall clock"


def test_a_step_that_is_not_logged_touches_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "uses_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: pytest.fail("an event"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("a wait"))
    waits = WaitingClock()
    waits.start(False)
    clock = StepClock(False, waits)
    with waits.waiting("all_to_all"):
        clock.lap("forward")
    clock.stop()
    assert clock.total > 0
    assert clock.tokens_waited == 0


def test_parts_and_waits_on_a_cpu() -> None:
    waits = WaitingClock()
    waits.start(True)
    clock = StepClock(True, waits)
    clock.lap("data")
    with waits.waiting("counts"):
        time.sleep(0.02)
    clock.lap("forward")
    clock.stop()
    assert clock.waits["data"] == 0
    assert 0.02 <= clock.waits["forward"] <= clock.seconds["forward"] <= clock.total
    assert clock.tokens_waited == 0
    waits.start(True)
    assert waits.count == 0, "a new step"
