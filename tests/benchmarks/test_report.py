"""The page of a long run is small and soon written: `benchmarks/report.py` on a short run, and on a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mepa_ds.reports.page.write import write_page
from mepa_ds.reports.records import read_records
from tests.benchmarks.importing import load_benchmark


def test_points_and_frames_of_a_made_up_run_have_their_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the records make the page no larger, once there are more of them than a chart has points."""
    benchmark = load_benchmark("report", monkeypatch)
    sizes = []
    for steps in (1200, 2400):
        options = benchmark.Options(steps=steps, every=2, layers=2, experts=4, scales=3, pictures=2, side=16)
        benchmark.made_up_run(tmp_path / str(steps), options)
        sizes.append(write_page([read_records(tmp_path / str(steps))], tmp_path / "page.html"))
    assert sizes[1] < 1.1 * sizes[0] < 1e6


@pytest.mark.slow
def test_100_000_steps_take_less_than_3_mb_and_10_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_benchmark("report", monkeypatch)
    found = benchmark.measure(benchmark.Options(), tmp_path)
    assert found["page_bytes"] < 3e6
    assert found["cpu_seconds"][1] < 10  # of the process: other programs may want the machine too
