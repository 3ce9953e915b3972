"""From a job and a cluster's profile to sbatch's command line, and a record of it beside the run."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mepa_ds import shipped
from mepa_ds.errors import UserError
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.safety.places import open_to_append, real_directory
from mepa_ds.safety.secrets import redacted
from mepa_ds.slurm.environment import exported
from mepa_ds.slurm.profile import Profile, root
from mepa_ds.slurm.scheduler import slurm

JOBS_NAME = "jobs.jsonl"
_NUMBER = re.compile(r"[0-9]+(_[0-9]+)?")


@dataclass(frozen=True)
class Job:
    """The job that one sbatch submits."""

    script: str
    """File in slurm/, without .sbatch."""
    arguments: tuple[str, ...]
    """The script's words."""
    state: Path
    """Where its log goes."""
    name: str
    nodes: int = 1
    tasks_per_node: int | None = None
    """Ranks a node, each with a GPU; None: the profile's GPUs a node. 0: one task without a GPU."""
    cpus: int = 1
    """CPUs of a task without a GPU."""
    time: str | None = None
    """SLURM's notation [default: the profile's]."""
    array: str | None = None
    after: tuple[str, ...] = ()
    """Jobs that must have succeeded."""
    after_any: str | None = None
    """A job that must have ended, whichever way."""
    copies_sets: bool = False


def sbatch_command(job: Job, profile: Profile) -> list[str]:
    """The whole line, sbatch first."""
    gpu = job.tasks_per_node != 0
    tasks = (job.tasks_per_node or profile.gpus_per_node) if gpu else 1
    cpus = profile.number("CPUS_PER_GPU", 8) if gpu else job.cpus
    partition = profile.get("PARTITION") if gpu else profile.get("CPU_PARTITION", profile.get("PARTITION"))
    options: dict[str, Any] = {
        "job-name": job.name,
        "partition": partition,
        "account": profile.get("ACCOUNT"),
        "qos": profile.get("QOS"),
        "constraint": profile.get("CONSTRAINT") if gpu else "",
        "reservation": profile.get("RESERVATION"),
        "exclude": profile.get("EXCLUDE"),
        "nodes": job.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": cpus,
        "time": job.time or profile.get("TIME"),
        "signal": f"B:USR1@{profile.number('SIGNAL_SECONDS', 300)}",
        "output": job.state / ("%x-%A_%a.log" if job.array else "%x-%j.log"),
        "array": job.array,
        "dependency": ",".join(
            [f"afterok:{':'.join(job.after)}"] * bool(job.after) + [f"afterany:{job.after_any}"] * bool(job.after_any)
        ),
        "chdir": root(),
        "export": exported(_own_variables(job, profile), job.arguments, profile),
    }
    if gpu:
        kind = profile.get("GPU_TYPE")
        options["gpus-per-node"] = f"{kind}:{tasks}" if kind else tasks
        if profile.get("MEM_PER_GPU_GB"):
            options["mem"] = f"{profile.number('MEM_PER_GPU_GB', 1) * tasks}G"
    words = [f"--{key}={value}" for key, value in options.items() if value not in ("", None)]
    return ["sbatch", "--parsable", *words, str(shipped.folder("slurm") / f"{job.script}.sbatch"), *job.arguments]


def _own_variables(job: Job, profile: Profile) -> dict[str, str]:
    exports = {"MEPA_ROOT": str(root()), "MEPA_SLURM": str(shipped.folder("slurm"))}
    exports["MEPA_CLUSTER"] = str(profile.path)
    if not profile.get("PYTHON") and not profile.get("CONTAINER"):
        exports["MEPA_PYTHON"] = sys.executable  # what the user submits with
    if job.copies_sets:
        exports["MEPA_STAGE"] = "on"
    return exports


def test_only(command: list[str]) -> None:
    """Asks SLURM whether it would take the job; raises UserError with its answer if not."""
    # Dependencies are left out: a job that is only planned has no number yet.
    words = [word for word in command[1:] if not word.startswith(("--dependency=", "--parsable"))]
    slurm(["sbatch", "--test-only", *words])


def submit(job: Job, profile: Profile, record: Path) -> str:
    """Submits, appends a line to `record`/jobs.jsonl, and returns the job's number."""
    for directory in {job.state, record}:
        _make_state(directory)
    command = sbatch_command(job, profile)
    number = slurm(command).strip().partition(";")[0]
    shown = [redacted(word) for word in command]
    line = {"job": number, "name": job.name, "time": time.time(), "state": str(job.state), "command": shown}
    with open_to_append(record / JOBS_NAME) as file:
        file.write(json.dumps(line).encode() + b"\n")
        os.fsync(file.fileno())
    return number


def _make_state(directory: Path) -> None:
    """Makes a directory of a job's state. SLURM writes the job's log there, through a link if it finds one."""
    real_directory(directory, "output_dir")
    for path in directory.glob("*.log"):
        if path.is_symlink():
            raise UserError(f"{path}: is a link, and a job's log would be written through it; remove it")


def recorded_jobs(record: Path) -> list[dict[str, Any]]:
    """The jobs that were submitted for a run, oldest first. Lines that say no job's number are none of ours."""
    return [
        {"name": "?", **line}
        for line in read_metrics(record / JOBS_NAME)  # lines of JSON too, of which a lost node may leave a torn one
        if all(isinstance(line.get(key), str) for key in ("job", "state"))
        and isinstance(line.get("time"), (int, float))
        and _NUMBER.fullmatch(line["job"])
    ]
