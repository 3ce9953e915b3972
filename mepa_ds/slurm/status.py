"""How a run is doing: its job in SLURM's eyes, and its own records."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mepa_ds.errors import UserError
from mepa_ds.metrics import read_metrics
from mepa_ds.slurm.cause import cause_of
from mepa_ds.slurm.jobs import recorded_jobs
from mepa_ds.slurm.parts import read_result
from mepa_ds.slurm.scheduler import job_fields

_RECENT = 20
_CHECKPOINT = re.compile(r"step_\d+")


def status(run: Path) -> dict[str, Any]:
    """State, restarts, step, throughput, time left, last error and last checkpoint of a run.

    Raises UserError for a directory that no job has written.
    """
    record = run / "slurm"
    jobs = recorded_jobs(record)
    owner = record / "owner"
    number = owner.read_text().split()[0] if owner.exists() else (jobs[-1]["job"] if jobs else None)
    if number is None:
        raise UserError(f"{run}: no job was submitted for it; give the output_dir of a run")
    fields = job_fields(number)
    report: dict[str, Any] = {
        "run": str(run),
        "job": number,
        "state": fields.get("JobState", "forgotten by SLURM"),
        "nodes": fields.get("NodeList", ""),
        "result": read_result(record) or "not started yet",
        "restarts": int(fields["Restarts"]) if "Restarts" in fields else _starts(record, number) - 1,
    }
    if fields.get("JobState") == "PENDING":
        report["waits for"] = fields.get("Reason", "")
    report |= dict(_training(run))
    log = Path(fields["StdOut"]) if "StdOut" in fields else None
    error = (
        cause_of(log.read_text(errors="replace").rpartition("=== ")[0]) if log is not None and log.is_file() else None
    )
    last = report["result"].partition("failed: ")[2] or report["result"].partition("): ")[2]
    report["last error"] = last or error or "none"
    checkpoints = run / "checkpoints"
    names = (
        sorted(p.name for p in checkpoints.iterdir() if _CHECKPOINT.fullmatch(p.name)) if checkpoints.is_dir() else []
    )
    report["last checkpoint"] = str(checkpoints / names[-1]) if names else "none"
    if log is not None:
        report["log"] = str(log)
    return report


def _starts(record: Path, job: str) -> int:
    path = record / f"starts-{job}"
    return len(path.read_text().splitlines()) if path.exists() else 1


def _training(run: Path) -> Iterator[tuple[str, Any]]:
    records = list(read_metrics(run / "metrics.jsonl"))
    train = [record for record in records if record.get("event") == "train"]
    start = [record for record in records if record.get("event") == "start"]
    if not train or not start:
        yield "step", "none logged yet"
        return
    num_steps = start[-1]["num_steps"]
    recent = train[-_RECENT:]
    seconds = statistics.median(record["step_seconds"] for record in recent)
    yield "step", f"{train[-1]['step']} of {num_steps}"
    yield "loss", round(train[-1]["loss"], 4)
    yield "images per second", round(statistics.median(record["images_per_second"] for record in recent), 1)
    yield "time left", _duration((num_steps - train[-1]["step"]) * seconds)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def format_status(report: dict[str, Any]) -> str:
    return "\n".join(f"{key:<18} {value}" for key, value in report.items() if value != "")
