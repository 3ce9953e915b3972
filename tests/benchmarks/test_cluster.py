"""benchmarks/cluster.py: the fit finds the rates of a machine that obeys the simulation; real ranks are on request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from mepa_ds.planning.cluster.operators import Operators
from mepa_ds.planning.cluster.work import RankWork
from tests.benchmarks.importing import load_benchmark
from tests.planning.cluster.test_step import WORK
from tests.tiny_run import ROOT, launch


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_benchmark("cluster", monkeypatch)
    monkeypatch.setattr(module, "usable_cpus", lambda: 2)
    return module


def some_work(size: int, images: int, ep_size: int) -> RankWork:
    """Amounts that grow with model and images, each in its own way."""
    return replace(
        WORK,
        operators=Operators(1e9 * size**3 * (images + 0.1), 1e7 * size**2 * (images + 1), 500 * size + 3 * images),
        forward_exchanges=0 if ep_size == 1 else 2 * size,
        backward_exchanges=0 if ep_size == 1 else 2 * size,
        exchanged_bytes=1e5 * size * images,
        expert_flops=0.0,
        shared_flops=0.0,
        expert_bytes=2e6 * size**3 / ep_size,
        other_bytes=1e6 * size**3,
        bucket_bytes=4e5,
        gradient_traffic=1e7 * size**3,
        optimizer_traffic=2e7 * size**3,
        sample_bytes=0.0,
    )


def test_a_machine_that_obeys_the_simulation_is_predicted(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 cores of 50 GFLOP/s, 8 GB/s, 10 us a launch, 1 GB/s and 0.5 ms between ranks, of which 4 share the cores."""
    cases = [case for ranks in (1, 2, 4) for case in benchmark.cases_of(ranks)]
    works = {case: some_work(case.size, case.micro_batch, case.ep_size) for case in cases}
    monkeypatch.setattr(benchmark, "work_of", lambda cases: works)
    truth = [2e-11, 1.25e-10, 1e-5, 1e-9, 5e-4]
    times = {case: {"seconds": benchmark.predict(case, works[case], truth)} for case in cases}
    found = benchmark.compare(times)
    assert list(found["seconds_per_unit"].values()) == pytest.approx(truth, rel=1e-3)
    assert all(error["largest"] < 1e-3 for error in found["errors"].values())
    halved = {case: {"seconds": time["seconds"] / 2} for case, time in times.items() if case.ranks < 4}
    halved |= {case: time for case, time in times.items() if case.ranks == 4}
    wrong = benchmark.compare(halved)["errors"]["ranks: fewer than 4, predicted 4"]
    assert wrong["median"] == pytest.approx(0.5, abs=0.01), "an error is seen as one"


@pytest.mark.processes
@pytest.mark.slow
def test_real_ranks_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "cluster.json"
    launched = launch(["--steps", "1", "--ranks", "1", "2", "--json", str(out)], script=ROOT / "benchmarks/cluster.py")
    assert launched.returncode == 0, launched.stderr
    result = json.loads(out.read_text())
    assert len(result["cases"]) == 12
    assert all(case["wall_seconds"] > 0 for case in result["cases"])
