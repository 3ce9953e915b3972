"""Changed files of every kind that strangers give us: each is read, or refused by one message of ours, in bounded time
and memory. The same changes each time; MEPA_FULL_TESTS=1 makes many more, and MEPA_FUZZ_SEED others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.on_request import FULL

ROOT = Path(__file__).parent.parent.parent
SEEDS = [int(os.environ["MEPA_FUZZ_SEED"])] if "MEPA_FUZZ_SEED" in os.environ else [1, 2] if FULL else [1]
COUNT = 20_000 if FULL else 1200


@pytest.mark.processes
@pytest.mark.timeout(3600 if FULL else 600)
@pytest.mark.parametrize("seed", SEEDS)
def test_changed_files_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.fuzz", str(tmp_path / "files"), str(seed), str(COUNT)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=3600 if FULL else 580,
    )
    lines = done.stdout.splitlines()
    faults = [line for line in lines if line.startswith(("CASE", "WHOLE"))]
    assert not faults, "\n".join(faults[:20])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert lines[-1] == f"done {COUNT}"
