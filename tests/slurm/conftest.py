"""One cluster for all tests of this directory; they are skipped, with the reason, where none can run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import cluster as slurm_cluster
from tests.slurm.bed import SCENARIOS, STEPS, Bed, Run
from tests.tiny_run import make_run

AT_ONCE = 4
LONG = ("pipeline", "lost_nodes", "interrupted")
"""Scenarios that wait for one thing after another: they start first, and the others run meanwhile."""
TIMEOUT = 1200
"""Seconds: the first test that waits for scenarios waits for most of them."""


@pytest.fixture(scope="session")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    make_run(folder, f"train.steps={STEPS}", "log.evaluate_every=1000", "log.checkpoint_every=20")
    cluster = slurm_cluster.Cluster()
    try:
        yield Bed(cluster, folder)
    finally:
        shutil.copytree(cluster.folder / "log", folder / "slurm-logs")
        cluster.stop()


@pytest.fixture(scope="session")
def outcome(bed: Bed, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """`outcome(name)`: what the scenario of that name returned. Those of all collected tests start at once."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted = {item.originalname.removeprefix("test_") for item in items}
    if any("reference" in item.fixturenames for item in items):
        wanted.add("submitted")
    pool = ThreadPoolExecutor(AT_ONCE)
    names = sorted((name for name in SCENARIOS if name in wanted), key=lambda name: name not in LONG)
    futures = {name: pool.submit(SCENARIOS[name], bed) for name in names}
    yield lambda name: futures[name].result(timeout=TIMEOUT)
    pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture(scope="session")
def reference(outcome: Callable[[str], Any]) -> Run:
    """One node, two ranks, never interrupted."""
    run: Run = outcome("submitted").run
    assert run.wait() == "COMPLETED", run.text
    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The quick tests that need the cluster to themselves come first; scenarios run behind the others."""
    here = Path(__file__).parent
    ours = [item for item in items if item.path.is_relative_to(here)]
    rest = [item for item in items if not item.path.is_relative_to(here)]
    for item in ours:
        item.add_marker(pytest.mark.timeout(TIMEOUT))
        if "bed" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
    items[:] = rest + sorted(ours, key=lambda item: "outcome" in getattr(item, "fixturenames", ()))
