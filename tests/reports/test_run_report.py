"""What a run did, read from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.errors import UserError
from mepa_ds.reports.run_report import format_report, run_report


def train(step: int, speed: float, memory: int) -> dict[str, Any]:
    scores = {"epoch": step / 10, "ce": 2.0, "ce_last": 3.0}
    return {"event": "train", "step": step, "images_per_second": speed, "peak_memory_bytes": memory, **scores}


def heldout(step: int, ce: float | str, best: bool) -> dict[str, Any]:
    return {"event": "heldout", "step": step, "ce": ce, "ce_last": ce, "accuracy": 0.1, "best": best}


def write(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_speed_is_the_last_starts_and_scores_are_those_of_the_best_weights(tmp_path: Path) -> None:
    """Then on other ranks, and with other held-out tokens, whose scores are not compared with the old ones."""
    first = [{"event": "start", "step": 0, "world_size": 8}, train(1, 800.0, 9), train(2, 800.0, 9)]
    scores = [heldout(2, 2.0, True), heldout(3, "nan", False)]
    second = [{"event": "start", "step": 2, "world_size": 16}, train(3, 1500.0, 5), train(4, 1600.0, 6)]
    report = run_report(write(tmp_path, *first, *scores, *second, heldout(4, 2.5, True), heldout(5, 2.6, False)))
    assert (report["world_size"], report["samples_per_second"], report["peak_memory_bytes"]) == (16, 1550.0, 6)
    assert (report["heldout_ce"], report["best_step"], report["steps"]) == (2.5, 4, 4)
    assert report["starts"] == [
        {"from_step": 0, "to_step": 2, "samples_per_second": 800.0, "peak_memory_bytes": 9, "world_size": 8},
        {"from_step": 2, "to_step": 4, "samples_per_second": 1550.0, "peak_memory_bytes": 6, "world_size": 16},
    ]
    table = format_report(report)
    assert "start 1                        steps 0 to 2, samples per second 800, " in table
    assert "start 2                        steps 2 to 4, " in table
    # A start that has not come to a record yet.
    report = run_report(write(tmp_path, *first, {"event": "start", "step": 2, "world_size": 4}))
    assert (report["world_size"], report["samples_per_second"]) == (4, 800.0)
    assert "heldout_ce" not in report


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: no training is recorded there"):
        run_report(tmp_path)
