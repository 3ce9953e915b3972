"""The test bed: a cluster, data for tiny runs, and scenarios that go on in the background while others wait."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mepa_ds.runtime.metrics import read_metrics
from tests.gates import Gates
from tests.slurm.cluster import ROOT, Cluster
from tests.tiny_run import losses

STEPS = 40
SCENARIOS: dict[str, Callable[[Bed], Any]] = {}


@dataclass
class Run:
    """One submitted training job."""

    bed: Bed
    job: str
    output: Path
    log: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        """What was logged of every step."""
        return [r for r in read_metrics(self.output / "metrics.jsonl") if r["event"] == "train"]

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def losses(self) -> list[float]:
        return losses(self.output)

    @property
    def restarts(self) -> int:
        return int(self.bed.cluster.job(self.job)["Restarts"])

    @property
    def steps_computed(self) -> int:
        """Lines of steps in the log: a step that was done twice stands there twice."""
        return sum(line.startswith("step ") and "/" in line.split()[1] for line in self.text.splitlines())

    def wait_start(self, number: int, timeout: float = 600) -> None:
        """Until the job has started for the so-and-so-many-th time."""
        text = f"job {self.job}, start {number}:"
        self.bed.cluster.wait_for(lambda: text in self.text, timeout, self._explain)

    def wait(self, timeout: float = 900) -> str:
        return self.bed.cluster.wait_job(self.job, timeout)

    def _explain(self) -> str:
        return self.text + str(self.bed.cluster.job(self.job))


@dataclass
class Bed:
    cluster: Cluster
    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def environment(self) -> dict[str, str]:
        return {"MEPA_CLUSTER": "ci", "MEPA_HEALTH": "off", "MEPA_PYTHON": sys.executable}

    def train(
        self,
        name: str,
        *overrides: str,
        nodes: int = 1,
        ranks: int = 2,
        options: tuple[str, ...] = (),
        script: str = "pretrain",
        recipe: Path | None = None,
        gates: Gates | None = None,
        **env: str,
    ) -> Run:
        """Submits one of slurm/*.sbatch with plain sbatch. A pretraining run's ranks wait at `gates`."""
        if gates is not None:
            env["MEPA_PYTHON"] = str(self.python_with(gates))
        output, log = self.folder / name, self.folder / f"{name}.log"
        size = [f"--nodes={nodes}", f"--ntasks-per-node={ranks}", f"--gpus-per-node={ranks}", "--cpus-per-task=1"]
        words = [f"slurm/{script}.sbatch", str(recipe or self.recipe), f"output_dir={output}", *overrides]
        command = ["sbatch", "--parsable", *size, f"--output={log}", *options, *words]
        return Run(self, self.cluster.check(*command, env=self.environment | env).strip(), output, log)

    def gates(self, name: str, *places: str) -> Gates:
        return Gates(self.folder / f"{name}.gates", *places, patience=900)

    def python_with(self, gates: Gates) -> Path:
        """What to name as Python, so that `python -m mepa_ds pretrain` runs with gates."""
        path = gates.folder / "python"
        path.write_text(
            "#!/bin/bash\n"
            f"gated=(-m tests.gates {gates.folder} pretrain.py)\n"
            '[[ "$1 $2 $3" != "-m mepa_ds pretrain" ]] || set -- "${gated[@]}" "${@:4}"\n'
            f'exec {sys.executable} "$@"\n'
        )
        path.chmod(0o755)
        return path

    def mepa(self, *words: str | Path, **env: str) -> tuple[int, str]:
        """Runs `mepa slurm ...` on the login node; exit status and output."""
        command = [sys.executable, "-m", "mepa_ds", "slurm", *words]
        result = self.cluster.run(*command, env=self.environment | env, timeout=240)
        return result.returncode, result.stdout + result.stderr

    def ranks_of(self, run: Run) -> list[int]:
        """Process numbers, as this machine counts them, of a run's Python ranks."""
        gated = self._processes(run, "-m", "tests.gates")
        return gated + self._processes(run, "-m", "mepa_ds", "pretrain")

    def _processes(self, run: Run, *program: str) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode().split("\0")
            except OSError:
                continue
            if words[1 : 1 + len(program)] == list(program) and f"output_dir={run.output}" in words:
                found.append(int(path.parent.name))
        return found

    def kill(self, run: Run) -> None:
        """SIGKILL to a run's ranks and to the programs that watch them, at once."""
        watchers = self._processes(run, str(ROOT / "slurm/launch.py"))
        for pid in [*watchers, *self.ranks_of(run)]:
            os.kill(pid, signal.SIGKILL)

    def freeze(self, run: Run) -> list[int]:
        ranks = self.ranks_of(run)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        return ranks


def scenario(function: Callable[[Bed], Any]) -> Callable[[Bed], Any]:
    """Registers what `test_<name>` wants to have happened; it runs in the background from the start of the session."""
    SCENARIOS[function.__name__] = function
    return function


def broken_deepspeed(folder: Path) -> Path:
    """A directory that, on PYTHONPATH, makes every start of pretrain.py crash: a broken installation."""
    path = folder / "broken" / "deepspeed" / "__init__.py"
    path.parent.mkdir(parents=True)
    path.write_text('raise RuntimeError("the driver is too old")\n')
    return path.parents[1]


__all__ = ["ROOT", "SCENARIOS", "STEPS", "Bed", "Run", "broken_deepspeed", "scenario"]
