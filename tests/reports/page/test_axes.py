"""Images, FLOPs and hours at a step, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mepa_ds.reports.page.axes import RunAxes
from mepa_ds.reports.records import read_records
from tests.reports.made_up import tokenizer_records, write_run


def test_a_run_whose_speed_changes(tmp_path: Path) -> None:
    records = [
        {"event": "start", "step": 0, "step_flops": 5.0},
        {"event": "train", "step": 10, "images": 80, "mean_step_seconds": 36.0, "flops_per_second": 2.0},
        {"event": "train", "step": 30, "images": 240, "mean_step_seconds": 18.0, "flops_per_second": 3.0},
    ]
    axes = RunAxes(read_records(write_run(tmp_path, records)))
    found = axes.at(np.array([0.0, 5.0, 10.0, 20.0, 30.0]))
    assert found["images"] == [0, 40, 80, 160, 240]
    assert found["hours"] == [0, 0.05, 0.1, 0.15, 0.2]
    assert found["flops"] == [0, 360, 720, 1260, 1800]
    assert (axes.total("hours"), axes.total("flops")) == (pytest.approx(0.2), pytest.approx(1800))


def test_a_branch_has_done_its_own_work_alone(tmp_path: Path) -> None:
    records = [
        {"event": "start", "step": 100, "step_flops": 5.0},
        {"event": "train", "step": 110, "images": 880, "mean_step_seconds": 36.0},
        {"event": "train", "step": 120, "images": 960, "mean_step_seconds": 36.0},
    ]
    found = RunAxes(read_records(write_run(tmp_path, records))).at(np.array([100.0, 120.0]))
    assert found == {"steps": [100, 120], "images": [800, 960], "hours": [0, 0.2], "flops": [0, 100]}


def test_a_tokenizers_run_has_no_flops(tmp_path: Path) -> None:
    axes = RunAxes(read_records(write_run(tmp_path, tokenizer_records(10))))
    assert axes.names == ["steps", "images", "hours"]
    assert axes.total("hours") == pytest.approx(800 / 20 / 3600)
