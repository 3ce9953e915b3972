"""How long a start takes: `mepa --help`, and a run until its first record; against a start that imports eagerly.

A run's figure is the CPU time of its process: with one thread it is what the clock of a quiet machine shows. The run is
a nano MEPA on random tokens. The compared start is the same one after an import of torch.compile and of PyTorch's
distributed tensors, which every start imported before mepa_ds/engine/starting/lean_start.py. Starts alternate.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
import yaml

from mepa_ds.machine import cpu_name
from tests.tiny_run import ROOT, make_run

EAGER = "import torch._inductor.compile_fx, torch.distributed.checkpoint; "
START = "import sys; sys.argv = {words}; from mepa_ds.cli.main import main; main()"


@dataclass
class Options:
    """How often, and where the numbers go."""

    rounds: int = 5
    """Starts of each kind."""
    json: Path | None = None
    """Where the numbers go as well."""


def main(options: Options) -> None:
    seconds: dict[str, list[float]] = {"help": [], "first step": [], "first step, eager imports": []}
    with tempfile.TemporaryDirectory(prefix="start_benchmark_") as name:
        folder = Path(name)
        recipe = make_run(folder, "train.steps=2", "data.heldout_tokens=null")
        for _ in range(options.rounds):
            seconds["help"].append(_until_the_end(START.format(words=["mepa", "--help"])))
            for kind, before in (("first step", ""), ("first step, eager imports", EAGER)):
                output = folder / f"run_{len(seconds[kind])}_{len(before)}"
                words = ["mepa", "pretrain", str(recipe), f"output_dir={output}"]
                seconds[kind].append(_until_the_first_record(before + START.format(words=words), output))
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    pairs = zip(seconds["first step, eager imports"], seconds["first step"], strict=True)
    ratio = statistics.median(eager / lean for eager, lean in pairs)
    report = {"cpu": cpu_name(), "cpu_seconds": medians, "eager_over_lean": ratio, "all": seconds}
    print(yaml.safe_dump({key: value for key, value in report.items() if key != "all"}, sort_keys=False))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2))


def _started(code: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    silent = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=silent, stderr=silent)


def _until_the_end(code: str) -> float:
    process = _started(code)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def _until_the_first_record(code: str, output: Path) -> float:
    """CPU seconds of the process when its first step is in metrics.jsonl, to within 0.02 s."""
    metrics, used = output / "metrics.jsonl", 0.0
    process = _started(code)
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert process.poll() is None, "the run has ended without a record"
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        time.sleep(0.01)
    assert process.wait() == 0
    return used


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
