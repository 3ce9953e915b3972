"""How a run is doing: its job in SLURM's eyes, and its own records."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mepa_ds.config.base import read_yaml
from mepa_ds.errors import UserError
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.safety.places import open_no_link
from mepa_ds.safety.text import printable
from mepa_ds.slurm import scheduler
from mepa_ds.slurm.in_job.cause import cause_of, read_log
from mepa_ds.slurm.in_job.parts import read_result
from mepa_ds.slurm.jobs import recorded_jobs

_RECENT = 20
_CHECKPOINT = re.compile(r"step_\d+")
_OWNER = re.compile(rb"[0-9]+\b")
_MOST_BYTES = 1 << 20
_START = re.compile(r"^=== \S+ \S+ job \S+, start \d+:", re.MULTILINE)


def status(run: Path) -> dict[str, Any]:
    """State, restarts, step, throughput, time left, last error and last checkpoint of a run.

    Raises UserError for a directory that no job has written.
    """
    record = run / "slurm"
    number = _job_of(record)
    if number is None:
        raise UserError(f"{run}: no job was submitted for it; give the output_dir of a run")
    fields, state = _fields(number)
    report: dict[str, Any] = {
        "run": str(run),
        "job": number,
        "state": state,
        "nodes": fields.get("NodeList", ""),
        "result": read_result(record) or "not started yet",
        "restarts": int(fields["Restarts"]) if "Restarts" in fields else _starts(record, number) - 1,
    }
    if fields.get("JobState") == "PENDING":
        report["waits for"] = fields.get("Reason", "")
    report |= dict(_training(run))
    log = Path(fields["StdOut"]) if "StdOut" in fields else None
    text = read_log(log) if log is not None else None
    error = last_error(text) if text is not None else None
    last = report["result"].partition("failed: ")[2] or report["result"].partition("): ")[2]
    report["last error"] = last or error or "none"
    report["last checkpoint"] = _last_checkpoint(run) or "none"
    if log is not None:
        report["log"] = str(log)
    return report


def _job_of(record: Path) -> str | None:
    """The job that works on a run, or a job that was submitted for it later."""
    # A pipeline records all its jobs beside the run; jobs of other stages have their state elsewhere.
    jobs = [job for job in recorded_jobs(record) if Path(job["state"]).resolve() == record.resolve()]
    owner, since = _owner(record / "owner")
    if owner is not None and not (jobs and jobs[-1]["time"] > since):
        return owner
    return jobs[-1]["job"] if jobs else None


def _owner(path: Path) -> tuple[str | None, float]:
    """The job that the file names, None where it names none, and the file's time."""
    try:
        with open(open_no_link(path, os.O_RDONLY), "rb") as file:
            found = _OWNER.match(file.read(_MOST_BYTES))
            return (found[0].decode() if found else None), os.fstat(file.fileno()).st_mtime
    except OSError:
        return None, 0.0


def _fields(number: str) -> tuple[dict[str, str], str]:
    try:
        found = scheduler.jobs(number)
    except UserError as error:
        return {}, f"unknown ({error})"
    return (found[0], found[0].get("JobState", "")) if found else ({}, "forgotten by SLURM")


def last_error(log: str) -> str | None:
    """The cause of the last failed start; None: no start has failed."""
    for text in reversed(_START.split(log)):
        cause = cause_of(text)
        if cause is not None:
            return cause
    return None


def _last_checkpoint(run: Path) -> str | None:
    folder, file = run / "checkpoints", run / "checkpoint.pt"  # of pretraining, of a tokenizer's training
    if file.exists():
        return str(file)
    names = (
        sorted(path.name for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)) if folder.is_dir() else []
    )
    return str(folder / names[-1]) if names else None


def _starts(record: Path, job: str) -> int:
    try:
        with open(open_no_link(record / f"starts-{job}", os.O_RDONLY), "rb") as file:
            return len(file.read(_MOST_BYTES).splitlines()) or 1
    except OSError:
        return 1


def _training(run: Path) -> Iterator[tuple[str, Any]]:
    records = list(read_metrics(run / "metrics.jsonl"))
    numbers = ("step", "loss", "images_per_second")
    train = [
        record
        for record in records
        if record.get("event") == "train" and all(isinstance(record.get(key), (int, float)) for key in numbers)
    ]
    if not train:
        yield "step", "none logged yet"
        return
    recipe = read_yaml(run / "resolved.yaml").get("train")
    batch = recipe.get("global_batch") if isinstance(recipe, dict) else None
    started = [record.get("num_steps") for record in records if record.get("event") == "start"]
    num_steps = started[-1] if started else recipe.get("steps") if isinstance(recipe, dict) else None
    step, speed = train[-1]["step"], statistics.median(record["images_per_second"] for record in train[-_RECENT:])
    yield "step", f"{step} of {num_steps}" if num_steps else step
    yield "loss", round(train[-1]["loss"], 4)
    yield "images per second", round(speed, 1)
    if isinstance(num_steps, int) and isinstance(batch, int) and num_steps and speed > 0:
        yield "time left", _duration((num_steps - step) * batch / speed)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def format_status(report: dict[str, Any]) -> str:
    return "\n".join(f"{key:<18} {printable(value)}" for key, value in report.items() if value != "")
