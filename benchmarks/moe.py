"""MoE feed-forward layers, forward + backward, on the same tensors in one run.

    python benchmarks/moe.py --json moe.json
    python benchmarks/moe.py --shapes 1024x4096x8 1024x1408x8 --dtypes bf16        (on a GPU)

ours          this project's layer: sort, experts, combine
ours loop     the same with a GEMM pair for each expert, where `ours` would not choose it
ours grouped  the same with grouped GEMMs, where `ours` would not choose them
ours ep2      `ours` over an expert-parallel group of two ranks, each with half of the tokens and half of the threads
mask loop     a Python loop over experts with boolean masks, as public reproductions do it
deepspeed     stock DeepSpeed MoE, dropless (each expert padded to the fullest one); left out where it is not installed
dense         one FFN of the same active FLOPs (hidden K x F)

All route the same tokens to the same experts: the router's logits are part of the input, new ones in every round, as
in training (libraries cache what they prepare for sizes that they have seen). `imbalance` is the load of the fullest
expert over the mean, as it came out (it cannot exceed E / K). Times are medians of milliseconds; memory is the peak
above what was there before, for ep2 that of a rank.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.measuring import peak_memory
from benchmarks.moe_layers import TOP_K, Layer, OneImplementation, Parameters, dense, mask_loop, ours, stock_deepspeed
from mepa_ds.machine import keep_freed_memory
from mepa_ds.models.moe.dispatch import LocalDispatcher
from mepa_ds.models.moe.experts import has_grouped_kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WARM_UP = 2


@dataclass
class Options:
    """Prints one table; ratios are taken within a run."""

    shapes: tuple[str, ...] = ("256x1024x8",)
    """C x F x E: width, hidden width of an expert, number of experts."""
    tokens: int = 8160
    """T, tokens in all."""
    imbalances: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Load of the fullest expert over the mean."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """Of weights and activations."""
    repeats: int = 9
    """Timed rounds; each round runs every contender once, in turn."""
    threads: int = 2
    """CPU threads (of each rank, for ep2: half of them)."""
    ep: bool = True
    """Also the expert-parallel layer on two ranks (two CPU processes)."""
    deepspeed: bool = True
    """Stock DeepSpeed's layer among the contenders."""
    json: Path | None = None
    """File for the figures."""
    contenders: tuple[str, ...] = ("ours", "ours loop", "ours grouped", "mask loop", "deepspeed", "dense")
    """What is measured, beside ep2."""


def skewed_logits(T: int, E: int, imbalance: float, seed: int = 0) -> Tensor:
    """(T, E) logits whose fullest expert has `imbalance` times the mean load; found by bisection on its bonus."""
    generator = torch.Generator().manual_seed(seed)
    noise_TE = torch.randn(T, E, generator=generator)
    low, high = 0.0, 20.0
    for _ in range(40):
        bonus = (low + high) / 2
        logits_TE = noise_TE.clone()
        logits_TE[:, 0] += bonus
        load = logits_TE.topk(TOP_K).indices.flatten().bincount(minlength=E)
        low, high = (low, bonus) if load.max() * E / (T * TOP_K) > imbalance else (bonus, high)
    return logits_TE


def imbalance_of(logits_TE: Tensor) -> float:
    """Load of the fullest expert over the mean."""
    load_E = logits_TE.topk(TOP_K).indices.flatten().bincount(minlength=logits_TE.shape[1])
    return (load_E.max() / load_E.float().mean()).item()


def measure(
    runs: dict[str, Layer],
    modules: dict[str, nn.Module],
    x_TC: Tensor,
    rounds: Sequence[Tensor],
    device: str,
) -> dict[str, dict[str, float]]:
    """In each of the `rounds` of logits every contender runs once: a slow moment of the machine meets all of them."""
    gradient = torch.randn_like(x_TC)

    def step(name: str, logits_TE: Tensor) -> None:
        x, logits = x_TC.detach().requires_grad_(), logits_TE.detach().requires_grad_()
        modules[name].zero_grad(set_to_none=True)
        runs[name](x, logits).backward(gradient)

    times: dict[str, list[float]] = {name: [] for name in runs}
    for number, logits_TE in enumerate(rounds):
        for name in runs:
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step(name, logits_TE)
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= _WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {
        name: {
            "ms": statistics.median(times[name]),
            "fastest_ms": min(times[name]),
            "peak_mib": peak_memory(lambda name=name: step(name, rounds[0]), device),  # type: ignore[misc]
        }
        for name in runs
    }


def one_case(options: Options, shape: str, dtype_name: str, imbalance: float, device: str) -> dict[str, Any]:
    C, hidden, E = map(int, shape.split("x"))
    dtype = DTYPES[dtype_name]
    shared = Parameters(C, hidden, E, dtype, device)
    runs: dict[str, Layer] = {}
    modules: dict[str, nn.Module] = {}
    torch.manual_seed(1)
    x_TC = torch.randn(options.tokens, C, device=device).to(dtype)
    rounds = [
        skewed_logits(options.tokens, E, imbalance, seed).to(device) for seed in range(options.repeats + _WARM_UP)
    ]
    chosen = "ours grouped" if has_grouped_kernel([x_TC, *shared.experts.parameters()]) else "ours loop"
    for name in options.contenders:
        if name == "ours":
            modules[name], runs[name] = shared, ours(shared, LocalDispatcher())
        elif name in ("ours loop", "ours grouped"):
            if name != chosen:
                forced = OneImplementation(shared.experts, name == "ours grouped")
                modules[name], runs[name] = shared, ours(shared, LocalDispatcher(), forced)
        elif name == "mask loop":
            modules[name], runs[name] = shared, mask_loop(shared)
        elif name == "dense":
            modules[name], runs[name] = dense(C, hidden, dtype, device)
        elif name == "deepspeed" and options.deepspeed:
            built = stock_deepspeed(C, hidden, E, dtype, device)
            if built is not None:
                modules[name], runs[name] = built
        elif name not in ("deepspeed", "dense"):
            raise SystemExit(f"--contenders: {name!r} is none of {', '.join(Options.contenders)}")
    results = measure(runs, modules, x_TC, rounds, device)
    real = round(statistics.mean(map(imbalance_of, rounds)), 2)
    return {"shape": shape, "dtype": dtype_name, "imbalance": real, "tokens": options.tokens, "results": results}


def ep_rank(rank: int, store: str, options: Options, cases: list[tuple[str, str, float]], queue: Any) -> None:
    """One of two ranks; rank 0 reports the medians of times between barriers and the larger rank's peak memory."""
    from mepa_ds.engine.expert_parallel import ExpertParallelDispatcher

    torch.set_num_threads(max(1, options.threads // 2))
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert dist.group.WORLD is not None
    for shape, dtype_name, imbalance in cases:
        C, hidden, E = map(int, shape.split("x"))
        dtype = DTYPES[dtype_name]
        parameters = Parameters(C, hidden, E // 2, dtype, "cpu")
        run = ours(parameters, ExpertParallelDispatcher(dist.group.WORLD, E))
        torch.manual_seed(1)
        mine = slice(rank * options.tokens // 2, (rank + 1) * options.tokens // 2)
        x_TC = torch.randn(options.tokens, C).to(dtype)[mine]
        gradient_TC = torch.randn_like(x_TC)

        def step(logits_TE, run=run, x_TC=x_TC, gradient_TC=gradient_TC, parameters=parameters) -> None:  # type: ignore[no-untyped-def]
            x, logits = x_TC.detach().requires_grad_(), logits_TE.detach().requires_grad_()
            parameters.zero_grad(set_to_none=True)
            run(x, logits).backward(gradient_TC)

        times = []
        for number in range(options.repeats + _WARM_UP):
            logits_TE = skewed_logits(options.tokens, E, imbalance, number)[mine]
            dist.barrier()
            started = time.perf_counter()
            step(logits_TE)
            dist.barrier()
            if number >= _WARM_UP:
                times.append(1e3 * (time.perf_counter() - started))
        peak = torch.tensor(peak_memory(lambda step=step, logits_TE=logits_TE: step(logits_TE), "cpu"))  # type: ignore[misc]
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        if rank == 0:
            queue.put({"ms": statistics.median(times), "fastest_ms": min(times), "peak_mib": peak.item()})
    dist.destroy_process_group()


def run_ep(options: Options, cases: list[tuple[str, str, float]]) -> list[dict[str, float]]:
    """Results of two ranks in processes of their own. Ends with a message when one of them dies."""
    import queue as queues
    import tempfile

    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=ep_rank, args=(rank, f"{folder}/store", options, cases, queue)) for rank in range(2)
        ]
        for process in ranks:
            process.start()
        results: list[dict[str, float]] = []
        while len(results) < len(cases):
            try:
                results.append(queue.get(timeout=1))
            except queues.Empty:
                if any(process.exitcode for process in ranks):
                    for process in ranks:
                        process.kill()
                    raise SystemExit("ours ep2: a rank died, its error stands above; --no-ep leaves it out") from None
        for process in ranks:
            process.join(60)
    return results


def growth(rows: list[dict[str, Any]]) -> list[str]:
    """What more experts cost at the same active FLOPs: each shape against that of fewest experts, all else equal."""
    lines = []
    for row in rows:
        width, _, E = row["shape"].rpartition("x")
        alike = [
            other
            for other in rows
            if other["shape"].startswith(f"{width}x")
            and (other["dtype"], other["asked"]) == (row["dtype"], row["asked"])
            and "ours" in other["results"]
        ]
        fewest = min(alike, key=lambda other: int(other["shape"].rpartition("x")[2]), default=row)
        if fewest is not row and "ours" in row["results"]:
            ratio = row["results"]["ours"]["ms"] / fewest["results"]["ours"]["ms"]
            few = fewest["shape"].rpartition("x")[2]
            lines.append(f"{width}, {row['dtype']}, imbalance {row['asked']:g}: E = {E} takes {ratio:.2f} x E = {few}")
    return lines


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()  # as the ranks of a run do
    cases = [(s, d, i) for s in options.shapes for d in options.dtypes for i in options.imbalances]
    ep_results = run_ep(options, cases) if options.ep and device == "cpu" else []
    if options.ep and device == "cuda":
        print("ours ep2: left out, it is measured on CPU ranks only")
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    rows = []
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {options.threads} threads"
    print(f"{name}, torch {torch.__version__}, {options.tokens} tokens, top-{TOP_K}, forward + backward")
    print(f"{'C x F x E':>14} {'type':>5} {'imbalance':>9}  {'layer':<12} {'ms':>8} {'MiB':>8}  {'x ours':>7}")
    for number, (shape, dtype_name, imbalance) in enumerate(cases):
        row = one_case(options, shape, dtype_name, imbalance, device) | {"asked": imbalance}
        if ep_results:
            row["results"]["ours ep2"] = ep_results[number]
        rows.append(row)
        ours_ms = row["results"].get("ours", {}).get("ms")
        for contender, result in row["results"].items():
            ratio = f"{result['ms'] / ours_ms:7.2f}" if ours_ms else ""
            head = f"{shape:>14} {dtype_name:>5} {row['imbalance']:>9}"
            print(f"{head}  {contender:<12} {result['ms']:8.1f} {result['peak_mib']:8.0f}  {ratio}", flush=True)
    for line in growth(rows):
        print(line)
    if options.json:
        report = {"device": name, "torch": torch.__version__, "threads": options.threads, "cases": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
