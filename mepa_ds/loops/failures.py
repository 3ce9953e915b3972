"""A crash of one rank, told once: the first cause in full, the others' broken connections in a line each."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from mepa_ds import distributed
from mepa_ds.errors import UserError
from mepa_ds.files import write_json
from mepa_ds.loops.recorder import write_status

ResultT = TypeVar("ResultT")
# A rank that loses its peers learns of it before the peer's report is on disk.
_PATIENCE_SECONDS = 3.0
_LOST_PEER = ("connection", "gloo", "nccl", "peer", "process group", "socket", "timed out", "aborted")


def reporting(output_dir: Path, body: Callable[[], ResultT]) -> ResultT:
    """Runs `body`; a crash is written to `output_dir/errors/rank_<rank>.json`, and ends the process with status 1.

    Only the rank that crashed first prints its traceback; one whose peers have gone says which rank to look at.
    """
    started, directory = time.time(), output_dir / "errors"
    try:
        return body()
    except UserError as error:
        if distributed.read_launch().is_main and output_dir.is_dir():
            with suppress(OSError):
                write_status(output_dir, "failed", error=str(error))
        raise
    except Exception as error:
        rank = distributed.read_launch().rank
        report = {"rank": rank, "time": time.time(), "error": f"{type(error).__name__}: {error}"}
        first = _first_report(directory, started) if _is_lost_peer(error) else None
        if first is not None and first["rank"] != rank:
            print(
                f"rank {rank}: ended because rank {first['rank']} failed: {first['error']}", file=sys.stderr, flush=True
            )
        else:
            with suppress(OSError):  # the disk may be what has failed
                write_json(_path(directory, rank), report | {"traceback": traceback.format_exc()})
                write_status(output_dir, "failed", error=report["error"], rank=rank)
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows the first one
                get_error_handler().record_exception(error)
        # No clean-up that would talk to ranks that may be gone.
        os._exit(1)


def _path(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank:05d}.json"


def _is_lost_peer(error: Exception) -> bool:
    text = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST_PEER)


def _first_report(directory: Path, since: float) -> dict[str, object] | None:
    """The earliest report of this start of the run, after waiting a little for one."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        reports = []
        for path in directory.glob("rank_*.json"):
            with suppress(OSError, ValueError):
                report = json.loads(path.read_text())
                if report["time"] >= since:
                    reports.append(report)
        if reports:
            return dict(min(reports, key=lambda report: report["time"]))
        time.sleep(0.1)
    return None
