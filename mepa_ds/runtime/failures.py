"""Reports a crash once: the first cause in full, and a line for each other rank that lost its connection."""

from __future__ import annotations

import os
import re
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mepa_ds import distributed, log
from mepa_ds.errors import DivergedError, UserError
from mepa_ds.files import read_file, write_json
from mepa_ds.runtime.lost_peers import is_lost_peer
from mepa_ds.runtime.run_lock import is_held
from mepa_ds.runtime.status import write_status
from mepa_ds.safety.reading import read_json_object

ResultT = TypeVar("ResultT")
# A rank may lose its connection before the report of the crashed peer is on disk, so it waits this long.
_PATIENCE_SECONDS = 3.0
# How often a rank looks whether it must answer, and how long the asking rank waits for answers.
_LOOK_SECONDS, _ANSWER_SECONDS = 3.0, 5.0
_NAMED = 8
_REPORT = {"rank": int, "time": float, "error": str, "lost_peer": bool}
_MOST_BYTES = 1 << 22
# NCCL's words for mistakes of the launcher or the environment. Starting again would not help then.
_RECURS = re.compile(r"ncclInvalidUsage|Duplicate GPU detected")


def reporting(output_dir: Path, body: Callable[[], ResultT]) -> ResultT:
    """Runs `body`. A crash is written to `output_dir/errors/rank_<rank>.json` and ends the process with status 1.

    One rank prints its traceback: the rank that crashed first. When a rank has ended without a report (killed by the
    system, a lost node), the first rank that misses it prints instead, and names the ranks that do not answer. All
    other ranks print one line.

    The status is 2 when the same crash would happen again.
    """
    started, directory, launch = time.time(), output_dir / "errors", distributed.read_launch()
    if launch.is_main and not is_held(output_dir):  # before the ranks meet, so before any can claim it
        with suppress(OSError):
            if directory.is_symlink():  # reports would be written elsewhere
                directory.unlink()
            _claim_path(directory).unlink()
    if launch.world_size > 1:
        arguments = (directory, launch.rank, started)
        threading.Thread(target=_answer, args=arguments, name="roll call", daemon=True).start()
    try:
        return body()
    except UserError as error:
        # A mistake in a recipe must not leave a new output_dir. In a held one, only the start that holds it writes.
        tells = (launch.is_main and output_dir.is_dir()) or isinstance(error, distributed.SetupError)
        if tells and not is_held(output_dir):
            with suppress(OSError):
                if isinstance(error, DivergedError):
                    write_status(output_dir, "diverged", step=error.step, error=str(error))
                else:
                    write_status(output_dir, "failed", error=str(error))
        raise
    except Exception as error:
        _tell(error, output_dir, started, launch)
        # No clean-up, because it would talk to ranks that may be gone.
        os._exit(2 if _RECURS.search(str(error)) else 1)


def _tell(error: Exception, output_dir: Path, started: float, launch: distributed.Launch) -> None:
    directory, rank = output_dir / "errors", launch.rank
    lost_peer = launch.world_size > 1 and isinstance(error, RuntimeError) and is_lost_peer(str(error))
    message = log.shown(f"{type(error).__name__}: {error}")
    report = {"rank": rank, "time": time.time(), "error": message, "lost_peer": lost_peer}
    with suppress(OSError):  # the disk itself may have failed
        write_json(directory / f"rank_{rank:05d}.json", report | {"traceback": log.shown(traceback.format_exc())})
    heading = f"error: rank {rank} failed: {_in_a_line(message)}"
    if lost_peer:
        first = _first_cause(directory, started, _PATIENCE_SECONDS)
        if first is None and not _claim(directory):
            log.note(f"rank {rank}: lost a peer: {message.splitlines()[0]}")
            return
        if first is None and (silent := _call(directory, started, launch.world_size)):
            message = _silent(silent)
            heading = f"error: {message}; rank {rank} has lost its peers:"
        elif first is None:  # all ranks answer, so this error is the cause, unless a report came late
            first = _first_cause(directory, started, 0.0)
        if first is not None:
            log.note(f"rank {rank}: ended because rank {first['rank']} failed: {_in_a_line(first['error'])}")
            return
    with suppress(OSError):
        write_status(output_dir, "failed", error=message, rank=rank)
    with suppress(OSError):
        log.say(f"{heading}\n{traceback.format_exc()}", flush=True, to_stderr=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows the first recorded error
        facts = {"py_callstack": log.shown(traceback.format_exc()), "timestamp": str(int(time.time()))}
        with suppress(OSError):  # as torch's own handler writes it, which knows no secrets
            write_json(Path(file), {"message": {"message": message, "extraInfo": facts}})


def _in_a_line(message: str) -> str:
    """Returns the message in one line, without the stack of C++ errors. NCCL names the cause in its last line."""
    lines = [line.strip() for line in message.split("\nException raised from")[0].splitlines()]
    return " ".join(line for line in lines if line)


def _silent(ranks: list[int]) -> str:
    named = ", ".join(str(rank) for rank in ranks[:_NAMED])
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return (
        f"no answer from rank{'s' if len(ranks) > 1 else ''} {named}{more}: killed from outside (the system's "
        "out-of-memory killer, a lost node), or stopped"
    )


def _call(directory: Path, since: float, world_size: int) -> list[int]:
    """Returns the ranks that neither report a failure nor answer. Ranks that merely wait for others do answer."""
    silent, end = set(range(world_size)), time.monotonic() + _ANSWER_SECONDS
    while silent and time.monotonic() < end:
        time.sleep(0.2)
        silent = set(range(world_size)) - {report["rank"] for report in _reports(directory, since)}
    return sorted(silent)


def _answer(directory: Path, rank: int, started: float) -> None:
    """Runs in a thread of each rank: when another rank has lost its peers, writes a file that says this rank lives."""
    while True:
        time.sleep(_LOOK_SECONDS)
        with suppress(OSError, ValueError):  # the claim is missing or still empty
            if float(read_file(_claim_path(directory), _MOST_BYTES)) < started:  # a claim of an earlier start
                continue
            answer = {"rank": rank, "time": time.time(), "error": "none: waits for others", "lost_peer": True}
            write_json(directory / f"alive_{rank:05d}.json", answer)
            return


def _reports(directory: Path, since: float) -> list[dict[str, Any]]:
    """Returns the reports and answers of this start of the run, earliest first."""
    reports = []
    for path in directory.glob("*.json"):
        with suppress(OSError, ValueError):
            report = read_json_object(path, _MOST_BYTES)
            is_whole = all(isinstance(report.get(key), kind) for key, kind in _REPORT.items())
            if is_whole and report["time"] >= since:
                reports.append(report)
    return sorted(reports, key=lambda report: report["time"])


def _first_cause(directory: Path, since: float, patience: float) -> dict[str, Any] | None:
    """Waits up to `patience` seconds for a report that is not a lost connection; returns the earliest one, or None."""
    end = time.monotonic() + patience
    while True:
        causes = [report for report in _reports(directory, since) if not report["lost_peer"]]
        if causes:
            return causes[0]
        if time.monotonic() >= end:
            return None
        time.sleep(0.1)


def _claim_path(directory: Path) -> Path:
    return directory / "first_loss"


def _claim(directory: Path) -> bool:
    """Returns whether this rank is the one that reports for all ranks that have lost a peer."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(_claim_path(directory), "x") as file:
            file.write(str(time.time()))
    except FileExistsError:
        return False
    except OSError:  # a full disk: two reports are better than none
        return True
    return True
