"""The last stage: what came out of a project, as a table, as JSON, and where to look."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.files import write_json
from mepa_ds.machine import peak_resident_bytes
from mepa_ds.project.choosing.choices import Choices
from mepa_ds.project.commands import report_command, serve_command
from mepa_ds.project.layout import Layout
from mepa_ds.project.stages.processes import run_quietly
from mepa_ds.project.stages.run import Spent, StageRun
from mepa_ds.reports.run_report import format_report, run_report
from mepa_ds.runtime.metrics import METRICS_NAME, as_written, read_metrics
from mepa_ds.safety.reading import read_json_object


def write_report(place: str, run: StageRun, chosen: Choices, layout: Layout, folder: Path) -> None:
    """Writes `layout.report` and says where everything is; `folder` is the project's, as the user named it."""
    log.say(f"{place} report", flush=True)
    started = time.perf_counter()
    code, usage = run_quietly(report_command(layout))
    if code:
        raise UserError(f"mepa report {layout.pretrain} ended with status {code}; its own message is above")
    report: dict[str, Any] = {
        **run_report(layout.pretrain),
        **_tokenizer_scores(chosen, layout),
        **_scores(chosen, layout),
    }
    own = Spent(round(time.perf_counter() - started, 2), max(usage.ru_maxrss * 1024, peak_resident_bytes()))
    stages = {**run.spent, "report": own}
    seconds = {name: stage.seconds for name, stage in stages.items()}
    report["stage_seconds"] = {**seconds, "total": round(sum(seconds.values()), 2)}
    report["stage_peak_memory"] = {f"{name}_bytes": stage.peak_memory_bytes for name, stage in stages.items()}
    write_json(layout.report, report)
    log.say(format_report(report))
    page = layout.pretrain / "report.html"
    log.say(f"\nsamples: {folder / layout.grid}\nreport:  {folder / (page if page.exists() else layout.report)}")
    there = "" if folder == Path() else f"cd {shlex.quote(str(folder))} && "
    log.say(f"web page to draw on: {there}{serve_command(layout)}")


def _scores(chosen: Choices, layout: Layout) -> dict[str, float]:
    if not chosen.classifier:
        return {}
    try:
        scores = read_json_object(layout.scores)
        return {name: scores[name] for name in ("class_agreement", "classifier_heldout_accuracy", "classifier.fd")}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{layout.scores}: these are no scores ({error}); remove it and run again") from error


def _tokenizer_scores(chosen: Choices, layout: Layout) -> dict[str, float]:
    if chosen.is_published or chosen.heldout == "none":
        return {}
    path = layout.tokenizer(chosen) / METRICS_NAME
    with as_written(path):
        records = [r for r in read_metrics(path) if r.get("event") == "heldout"]
        return {"tokenizer_psnr": records[-1]["psnr"], "tokenizer_codebook_use": records[-1]["codebook_use"]}
