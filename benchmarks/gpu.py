"""Everything that one hour of one GPU should answer, the most valuable first.

    python benchmarks/gpu.py --out results                        (on a GPU)
    python benchmarks/gpu.py --out results --only B,C --budget 440
    python benchmarks/gpu.py --out results --device cpu --tiny    (no figure of interest: every line of it runs)

A  ceilings      copy, matrix products, bicubic interpolation against matrices   (benchmarks/gpu_parts/ceilings.py)
B  correctness   every CUDA path against the CPU: the checks of tests/gpu          (benchmarks/gpu_parts/checks.py)
C  our step      its parts, MFU, memory against the plan, top kernels        (benchmarks/gpu_parts/step_profile.py)
D  whole steps   the public way against ours at equal batch, our gains, compiled       (benchmarks/train_step.py)
E  MoE layer     ours, a mask loop, DeepSpeed's own, dense; by load and experts               (benchmarks/moe.py)
F  attention     prefixes, masks, FlexAttention                                 (benchmarks/gpu_parts/attention.py)
G  checkpoints   what they cost a run                                                  (benchmarks/checkpoint.py)
H  sampling      images a second at 1, 8 and 64                                          (benchmarks/sampling.py)

Each command is a process with a time limit of its own. A result is one JSON line, on stdout and in OUT/gpu.jsonl, at
once: whatever stops the program, only the command that runs then is lost. OUT/gpu.log has all other output. Ends with
1 if a command failed or ran out of time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.gpu_parts.commands import PARTS, Command, commands_of
from mepa_ds.distributed import ACCELERATOR
from mepa_ds.machine import cpu_name

HERE = Path(__file__).parent
LEAST_SECONDS = 20
"""A command is not started with less time than this: its imports alone take half of it."""


@dataclass
class Options:
    """Runs the parts in the order of the alphabet."""

    out: Path
    """Directory for gpu.jsonl and gpu.log."""
    only: str = ",".join(PARTS)
    """Parts, separated by commas."""
    budget: float = 3600
    """Seconds for everything; what does not fit is left out, and a line says so."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where."""
    tiny: bool = False
    """Sizes of no interest, to see that every line runs."""


class Report:
    """Writes results and other output, each at once."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._results: TextIO = (directory / "gpu.jsonl").open("a")
        self._log: TextIO = (directory / "gpu.log").open("a")
        self._lock = threading.Lock()

    def result(self, part: str, **found: Any) -> None:
        line = json.dumps({"part": part, **found})
        with self._lock:
            print(line, flush=True)
            self._results.write(line + "\n")
            self._results.flush()
            os.fsync(self._results.fileno())

    def log(self, line: str) -> None:
        with self._lock:
            self._log.write(line)
            self._log.flush()


class Running:
    """The process group of the command that runs, if any: whoever ends this program ends it too."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)

    def start(self, words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        return self._process

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process = None

    def _stop(self, number: int, _: object) -> None:
        self.kill()
        sys.exit(128 + number)


def environment_of(device: str) -> dict[str, str]:
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return os.environ | hidden | {ACCELERATOR: device, "DS_ACCELERATOR": device, "PYTHONUNBUFFERED": "1"}


def run(part: str, command: Command, device: str, report: Report, running: Running, seconds: float) -> bool:
    """Runs a command for at most `seconds`, writes every result at once, and returns whether all went well."""
    with tempfile.TemporaryDirectory(prefix="gpu_benchmark_") as directory:
        figures = Path(directory) / "figures.json"
        words = [sys.executable, str(HERE / command.program), *command.arguments]
        words += ["--json", str(figures)] if command.has_json else []
        report.log(f"\n--- {part}: {' '.join(words[1:])}\n")
        started = time.monotonic()
        process = running.start(words, environment_of(device))
        reader = threading.Thread(target=_read, args=(process, report, part), daemon=True)
        reader.start()
        ended: Literal["ok", "failed", "out of time"]
        try:
            ended = "ok" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        running.kill()  # also of what a command that has ended left behind
        process.wait()
        reader.join(10)
        if figures.exists():
            report.result(part, **json.loads(figures.read_text()))
        took = time.monotonic() - started
        report.result(part, command=str(command), ended=ended, status=process.returncode, seconds=took)
    return ended == "ok"


def _read(process: subprocess.Popen[str], report: Report, part: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        found = as_result(line)
        if found is None:
            report.log(line)
        else:
            report.result(part, **found)


def as_result(line: str) -> dict[str, Any] | None:
    """The result that a line of output is; None for any other line."""
    if not line.startswith("{") or not line.endswith("}\n"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__}
    for library in ("triton", "deepspeed"):
        with suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    if device == "cpu":
        return found | {"device": cpu_name()}
    properties = torch.cuda.get_device_properties(0)
    capability = [properties.major, properties.minor]
    return found | {
        "device": properties.name,
        "capability": capability,
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()),
    }


def chosen(only: str) -> list[str]:
    letters = [word.strip().upper() for word in only.split(",") if word.strip()]
    if unknown := [letter for letter in letters if letter not in PARTS]:
        raise SystemExit(f"--only: {', '.join(unknown)}: expected some of {', '.join(PARTS)}, separated by commas")
    return sorted(set(letters))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    letters = chosen(options.only)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu --tiny sees that every line runs")
    deadline = time.monotonic() + options.budget
    report, running = Report(options.out), Running()
    report.result("machine", **machine(options.device))
    all_well = True
    for letter in letters:
        for command in commands_of(letter, options.device, options.tiny):
            left = deadline - time.monotonic()
            if left < min(LEAST_SECONDS, command.seconds):
                report.result(letter, command=str(command), ended="not started")
                continue
            all_well &= run(letter, command, options.device, report, running, min(command.seconds, left))
    raise SystemExit(int(not all_well))


if __name__ == "__main__":
    main()
