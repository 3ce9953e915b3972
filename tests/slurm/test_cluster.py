"""The test cluster itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.slurm.bed import ROOT, Bed

_START = """
import sys, time
from tests.slurm.cluster import Cluster
cluster = Cluster(nodes=2)
print(cluster.folder, flush=True)
time.sleep(600)
"""


def processes_of(folder: str) -> list[str]:
    """Commands of all processes that know a cluster's folder, by argument or environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            known = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
        except OSError:
            continue
        if folder.encode() in known:
            found.append((path / "comm").read_text().strip())
    return found


def test_everything_dies_with_the_session(bed: Bed) -> None:
    """However it ends: here, by SIGKILL."""
    session = subprocess.Popen([sys.executable, "-c", _START], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert session.stdout is not None
    folder = session.stdout.readline().strip()
    assert {"slurmctld", "slurmd", "munged"} <= set(processes_of(folder))
    os.kill(session.pid, signal.SIGKILL)
    session.wait()
    end = time.monotonic() + 60
    while left := processes_of(folder):
        assert time.monotonic() < end, left
        time.sleep(0.2)
    subprocess.run(["rm", "-r", folder], check=True)


def test_nodes_have_networks_and_disks_of_their_own(bed: Bed) -> None:
    words = ("--partition=gpu", "--nodes=2", "--gpus-per-node=1")
    script = (
        "hostname; hostname -I; echo $SLURMD_NODENAME > /mnt/me; sleep 0.5; cat /mnt/me; ls /proc | grep -c '^[0-9]'"
    )
    output = bed.cluster.check("srun", *words, "--label", "bash", "-c", script)
    by_task = [[line[3:].strip() for line in output.splitlines() if line.startswith(f"{task}: ")] for task in (0, 1)]
    assert [lines[:3] for lines in by_task] == [["n1", "10.99.0.11", "n1"], ["n2", "10.99.0.12", "n2"]]
    assert all(int(lines[3]) < 50 for lines in by_task)
