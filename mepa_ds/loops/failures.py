"""A crash of one rank, told once: the first cause in full, the others' broken connections in a line each."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from mepa_ds import distributed, log
from mepa_ds.errors import UserError
from mepa_ds.files import write_json
from mepa_ds.loops.recorder import write_status

ResultT = TypeVar("ResultT")
# A rank that loses its peers learns of it before the peer's report is on disk.
_PATIENCE_SECONDS = 3.0
_LOST_PEER = ("connection", "gloo", "nccl", "peer", "process group", "socket", "timed out", "aborted")
_NAMED = 8


def reporting(output_dir: Path, body: Callable[[], ResultT]) -> ResultT:
    """Runs `body`; a crash is written to `output_dir/errors/rank_<rank>.json`, and ends the process with status 1.

    One rank prints its traceback: the one that crashed first or, when a rank is gone without a word (killed by the
    system, a lost node), the first of those that miss it, which says whose report is not there. Others print a line.
    """
    started, directory, launch = time.time(), output_dir / "errors", distributed.read_launch()
    if launch.is_main:  # before it meets the others, so before any of them can claim it
        with suppress(OSError):
            _claim_path(directory).unlink()
    try:
        return body()
    except UserError as error:
        if launch.is_main and output_dir.is_dir():
            with suppress(OSError):
                write_status(output_dir, "failed", error=str(error))
        raise
    except Exception as error:
        _tell(error, output_dir, started, launch)
        # No clean-up that would talk to ranks that may be gone.
        os._exit(1)


def _tell(error: Exception, output_dir: Path, started: float, launch: distributed.Launch) -> None:
    directory, rank, lost_peer = output_dir / "errors", launch.rank, _is_lost_peer(error)
    message = f"{type(error).__name__}: {error}"
    report = {"rank": rank, "time": time.time(), "error": message, "lost_peer": lost_peer}
    with suppress(OSError):  # the disk may be what has failed
        write_json(directory / f"rank_{rank:05d}.json", report | {"traceback": traceback.format_exc()})
    heading = f"rank {rank} failed:"
    if lost_peer:
        first = _first_cause(directory, started)
        if first is not None:
            log.note(f"rank {rank}: ended because rank {first['rank']} failed: {first['error']}")
            return
        if not _claim(directory):
            log.note(f"rank {rank}: lost a peer: {message.splitlines()[0]}")
            return
        silent = sorted(set(range(launch.world_size)) - {report["rank"] for report in _reports(directory, started)})
        heading = f"error: {_silent(silent)}; rank {rank} has lost its peers:"
        message = _silent(silent)
    with suppress(OSError):
        write_status(output_dir, "failed", error=message, rank=rank)
    log.note(f"{heading}\n{traceback.format_exc()}")
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows the first one
        with suppress(OSError):
            get_error_handler().record_exception(error)


def _silent(ranks: list[int]) -> str:
    if not ranks:
        return "connections between the ranks broke, though all have left a report in errors/"
    named = ", ".join(str(rank) for rank in ranks[:_NAMED])
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return (
        f"no report from rank{'s' if len(ranks) > 1 else ''} {named}{more}: killed from outside (the system's "
        "out-of-memory killer, a lost node), or stuck"
    )


def _is_lost_peer(error: Exception) -> bool:
    text = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST_PEER)


def _reports(directory: Path, since: float) -> list[dict[str, Any]]:
    """Those of this start of the run, earliest first."""
    reports = []
    for path in directory.glob("rank_*.json"):
        with suppress(OSError, ValueError):
            report = json.loads(path.read_text())
            if report["time"] >= since:
                reports.append(report)
    return sorted(reports, key=lambda report: report["time"])


def _first_cause(directory: Path, since: float) -> dict[str, Any] | None:
    """The earliest report that is no lost connection, after waiting a little for one."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        causes = [report for report in _reports(directory, since) if not report["lost_peer"]]
        if causes:
            return causes[0]
        time.sleep(0.1)
    return None


def _claim_path(directory: Path) -> Path:
    return directory / "first_loss"


def _claim(directory: Path) -> bool:
    """Whether this rank is the one to speak for all that have lost a peer."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _claim_path(directory).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk: better twice than never
        return True
    return True
