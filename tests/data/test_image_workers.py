"""Processes that decode images, and the signals that are meant for their rank."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mepa_ds.data.images import image_batches
from mepa_ds.data.options import LoaderOptions
from mepa_ds.errors import UserError
from tests.data.shard_fixtures import make_set
from tests.tiny_run import ROOT

RANK = """
import itertools, sys
from pathlib import Path
from mepa_ds.data.images import image_batches
from mepa_ds.data.options import LoaderOptions
from mepa_ds.runtime.stopping import REQUEUE_EXIT_CODE, StopRequests

stop = StopRequests()
options = LoaderOptions(num_workers=2)
batches = image_batches(Path(sys.argv[1]), batch_size=4, image_side=8, options=options)
for number, batch in enumerate(batches):
    if number == 3:
        print("running", flush=True)
    if stop.reason is not None:
        break
for batch in itertools.islice(batches, 50):  # the rest of the step
    pass
print("saved after", stop.reason, flush=True)
sys.exit(REQUEUE_EXIT_CODE)  # with the workers still there
"""


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_step_lets_the_rank_save(tmp_path: Path, number: signal.Signals) -> None:
    make_set(tmp_path, "images", [12, 11])
    with subprocess.Popen(
        [sys.executable, "-c", RANK, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "running\n"
        os.killpg(rank.pid, number)
        printed, errors = rank.communicate(timeout=60)
    assert printed == f"saved after {number.name}\n", errors
    assert rank.returncode == 75, errors
    assert errors == f"{number.name}: the step ends, the run is saved and stops; a second signal ends it at once\n"
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(rank.pid, 0)


def test_a_killed_worker_is_named_where_its_batch_is_asked_for(tmp_path: Path) -> None:
    """PyTorch's own exception would come at once, in the middle of whatever the rank does then."""
    make_set(tmp_path, "images", [12, 11])
    others = multiprocessing.active_children()
    batches = image_batches(tmp_path, batch_size=4, image_side=8, options=LoaderOptions(num_workers=2))
    next(batches)
    worker = next(child for child in multiprocessing.active_children() if child not in others)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and nothing has been raised
    message = (
        r"a worker process that decodes images was killed \(SIGKILL\), perhaps for want of memory; use fewer data\.n"
    )
    with pytest.raises(UserError, match=message):
        list(itertools.islice(batches, 1000))
