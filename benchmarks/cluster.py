"""The error of `mepa scale cluster` where it can be measured: real runs of 1, 2 and 4 ranks on this machine's CPUs.

    python benchmarks/cluster.py --json cluster.json

Each case trains a small mixture of experts with DeepSpeed on gloo ranks, on random tokens: other sizes of models, of
micro-batches, of expert-parallel groups, and more or less accumulation. A step's time is the processor time of all its
ranks over the cores that they can use, the least of several steps: on CPUs messages too are work of the processor, and
other work on the machine disturbs this number least (`wall_seconds` is the clock's). The simulation says for each case
how many operations, bytes, launches, and bytes and messages between ranks a step has. The five rates of this machine
that turn these into seconds are fitted to some cases (least squares of relative errors, none below 0), and the others
are predicted by the very function that the command uses. Ranks beyond the number of cores share these: their rates are
that much lower.

Three splits: the fit sees one and two ranks, and predicts four; it sees the small model, and predicts the large one; it
sees all but one case, and predicts that one.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from scipy.optimize import nnls
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from mepa_ds.config.base import validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.machine import cpu_name, keep_freed_memory, usable_cpus
from mepa_ds.objective.objective import ModelInputs
from mepa_ds.planning.cluster.machines import Assumptions, Cluster
from mepa_ds.planning.cluster.step import Layout, step_seconds
from mepa_ds.planning.cluster.work import RankWork, Workload

_WARM_UP = 2


@dataclass
class Options:
    """Prints a table of measured and predicted steps, and the errors of three splits."""

    steps: int = 5
    """Timed steps of a case in a round; the fastest counts."""
    rounds: int = 1
    """Times that all cases are measured."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks."""
    json: Path | None = None
    """File for the numbers."""


@dataclass(frozen=True)
class Case:
    """A run; `size` is the depth of a model that is 64 times as wide."""

    size: int
    ranks: int
    ep_size: int
    micro_batch: int
    accumulation: int

    @property
    def layout(self) -> Layout:
        return Layout(self.ranks, self.ep_size, self.micro_batch, self.accumulation, overlap=False)


SMALL, LARGE = 2, 4
_SHAPES = ((SMALL, 4, 1), (SMALL, 32, 1), (SMALL, 8, 3), (LARGE, 8, 1))  # size, micro-batch, accumulation


def cases_of(ranks: int) -> list[Case]:
    """Every shape without expert parallelism, and with all ranks in one group."""
    return [
        Case(size, ranks, ep_size, micro_batch, accumulation)
        for ep_size in sorted({1, ranks})
        for size, micro_batch, accumulation in _SHAPES
    ]


def config_of(case: Case) -> PretrainConfig:
    values = {
        "output_dir": "unused",
        "tokenizer": "unused",
        "data": {"tokens": "unused"},
        "model": {"preset": f"mepa-d{case.size}", "scales": [1, 2, 3, 4, 6], "codebook_size": 1024},
        "objective": {"alignment": None},
        "train": {"global_batch": case.layout.global_batch, "accumulation": case.accumulation, "steps": 1},
        "parallel": {"precision": "fp32", "ep_size": case.ep_size},
    }
    return validate(PretrainConfig, values, "benchmark")


def seconds_of_steps(case: Case, steps: int) -> dict[str, float]:
    """The least processor time of a step over the cores of all ranks, and the least time by the clock."""
    config = config_of(case)
    engine = PretrainEngine(config, None, torch.device("cpu"))
    model, schedule = config.model, config.model.schedule
    inputs = ModelInputs(
        labels_B=torch.randint(model.num_classes, (case.micro_batch,)),
        inputs_BLZ=torch.randn(case.micro_batch, schedule.num_tokens - schedule.lengths[0], model.code_width),
        tokens_BL=torch.randint(model.codebook_size, (case.micro_batch, schedule.num_tokens)),
    )
    busy, wall = [], []
    for _ in range(_WARM_UP + steps):
        dist.barrier()
        started, processor = time.perf_counter(), time.process_time()
        engine.begin_step()
        for _ in range(case.accumulation):
            engine.backward(engine.forward(inputs))
        engine.update(lr=1e-4)
        used = torch.tensor(time.process_time() - processor, dtype=torch.float64)
        dist.all_reduce(used)
        wall.append(time.perf_counter() - started)
        busy.append(used.item() / min(case.ranks, usable_cpus()))
    return {"seconds": min(busy[_WARM_UP:]), "wall_seconds": min(wall[_WARM_UP:])}


def rank_main(rank: int, cases: list[Case], steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as the ranks of a run do
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(cases[0].ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=cases[0].ranks)
    for number, case in enumerate(cases):
        torch.manual_seed(rank)
        seconds = seconds_of_steps(case, steps)
        if rank == 0:
            Path(folder, f"{number}.json").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def measure(options: Options) -> dict[Case, dict[str, float]]:
    """The least times of each case."""
    least: dict[Case, dict[str, float]] = {}
    turns = [ranks for _ in range(options.rounds) for ranks in options.ranks]
    for ranks in tqdm(turns, desc="numbers of ranks", disable=None):
        cases = cases_of(ranks)
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(rank_main, (cases, options.steps, folder), nprocs=ranks, start_method="spawn")
            for number, case in enumerate(cases):
                times = json.loads(Path(folder, f"{number}.json").read_text())
                before = least.get(case, times)
                least[case] = {name: min(seconds, before[name]) for name, seconds in times.items()}
    return least


# With these, all parts of a step are sums of amounts over rates.
_ADDED = Assumptions(
    matrix_share=1, expert_share=1, memory_share=1, link_share=1, hidden_share=0, imbalance=1, launches_ahead=False
)
_RATES = ("peak_flops", "memory_bandwidth", "launch_us", "node_bandwidth", "latency_us")


def machine(ranks: int, seconds: Sequence[float]) -> tuple[Cluster, Assumptions]:
    """This machine with so many seconds for one operation, byte, launch, byte between ranks, and message."""
    sharing = max(ranks / usable_cpus(), 1.0)
    flop, byte, launch, link, message = (sharing * value for value in seconds)
    rates = [1 / value if value else math.inf for value in (flop, byte, link)]
    cluster = Cluster(
        ranks_per_node=ranks,
        device_memory=None,
        peak_flops=rates[0],
        memory_bandwidth=rates[1],
        node_bandwidth=rates[2],
        network_bandwidth=math.inf,
        storage_bandwidth=math.inf,
        storage_total=math.inf,
    )
    return cluster, replace(_ADDED, launch_us=launch * 1e6, latency_us=message * 1e6)


def predict(case: Case, work: RankWork, seconds: Sequence[float]) -> float:
    """Seconds of a step by the simulation."""
    return sum(step_seconds(work, case.layout, *machine(case.ranks, seconds)).values())


def amounts(case: Case, work: RankWork) -> list[float]:
    """How much of each of `_RATES` a step has: its seconds where one unit takes one second, and all else none."""
    return [predict(case, work, unit) for unit in np.eye(len(_RATES)).tolist()]


def fit(measured: dict[Case, float], works: dict[Case, RankWork]) -> list[float]:
    """Seconds a unit of each rate, by relative errors."""
    rows = np.array([amounts(case, works[case]) for case in measured]) / np.array(list(measured.values()))[:, None]
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(rows / scale, np.ones(len(rows)))
    return [float(value) for value in found / scale]


def work_of(cases: Sequence[Case]) -> dict[Case, RankWork]:
    """The simulation's count of each case."""
    works: dict[Case, RankWork] = {}
    for size in sorted({case.size for case in cases}):
        own = [case for case in cases if case.size == size]
        images = (min(case.micro_batch for case in own), max(case.micro_batch for case in own))
        workload = Workload(config_of(own[0]), sorted({case.ep_size for case in own}), images, is_gpu=False)
        works |= {case: workload.of_rank(case.ep_size, case.micro_batch, case.ranks) for case in own}
    return works


def errors(
    measured: dict[Case, float], works: dict[Case, RankWork], seen: Sequence[Case], unseen: Sequence[Case]
) -> dict[Case, float]:
    """Relative errors of the cases that the fit has not seen."""
    rates = fit({case: measured[case] for case in seen}, works)
    return {case: predict(case, works[case], rates) / measured[case] - 1 for case in unseen}


def compare(times: dict[Case, dict[str, float]]) -> dict[str, Any]:
    """Errors of all splits, and the rates that fit all cases."""
    works, cases = work_of(list(times)), list(times)
    measured = {case: times[case]["seconds"] for case in cases}
    most = max(case.ranks for case in cases)
    splits = {
        f"ranks: fewer than {most}, predicted {most}": [case for case in cases if case.ranks == most],
        "models: the small one, predicted the large one": [case for case in cases if case.size == LARGE],
    }
    found = {
        name: errors(measured, works, [c for c in cases if c not in set(out)], out) for name, out in splits.items()
    }
    left_out: dict[Case, float] = {}
    for case in cases:
        left_out |= errors(measured, works, [other for other in cases if other != case], [case])
    found["all but one, predicted that one"] = left_out
    return {
        "seconds_per_unit": dict(zip(_RATES, fit(measured, works), strict=True)),
        "cases": [asdict(case) | times[case] | {"predicted": measured[case] * (1 + left_out[case])} for case in cases],
        "errors": {
            name: {
                "cases": len(split),
                "median": statistics.median(map(abs, split.values())),
                "largest": max(map(abs, split.values())),
            }
            for name, split in found.items()
        },
    }


def main(options: Options) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result: dict[str, Any] = {"machine": f"{usable_cpus()} cores of {cpu_name()}", "torch": torch.__version__}
    result |= compare(measure(options))
    print(result["machine"])
    for row in result["cases"]:
        print(
            f"d{row['size']}, {row['ranks']} ranks, ep_size {row['ep_size']}, {row['micro_batch']:>2} images x "
            f"{row['accumulation']}: {1e3 * row['seconds']:7.1f} ms, predicted from the others "
            f"{1e3 * row['predicted']:7.1f} ms ({row['predicted'] / row['seconds'] - 1:+.0%})"
        )
    print("seconds a unit:", {name: f"{value:.3g}" for name, value in result["seconds_per_unit"].items()})
    for name, error in result["errors"].items():
        print(
            f"{name}: {error['cases']} cases, error {error['median']:.0%} in the median, {error['largest']:.0%} at most"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
