"""Fine-tuning against training from scratch: does it reach the same held-out cross-entropy in half of the steps?

    python benchmarks/finetuning.py --json FILE      # Fashion-MNIST from a model of digits; resumes in --out

A model of four blocks is trained on scikit-learn's digits, and its best weights start runs on Fashion-MNIST, whose
classes are new (init_missing=classes). One tokenizer, trained on both, makes all tokens. Two data sets are compared:
`all` images, and a `few`, which is what most people have. For each of them and each seed:

scratch   drawn weights, `steps` steps; the target is its lowest held-out CE, that of RUN/best
half      from the weights of digits, steps / 2 steps with a schedule that ends there: is it at the target?
frozen    as half, with the first two of four blocks frozen
whole     from the weights of digits, `steps` steps: the first of 20 evaluations that is at or below the target

Scratch and half each have the best of `rates` by the first seed; frozen and whole have half's. Rates, targets and
results are all of the same held-out images, and the digits' own steps are not counted.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.finetuning_runs import ARMS, Curve, Options, Run, Workshop, lowest
from mepa_ds.command_line import entry
from mepa_ds.files import write_json
from mepa_ds.machine import cpu_name


def first_at_or_below(curve: Curve, target: float) -> int | None:
    """The step of the first evaluation that is no worse than the target; None: none is."""
    return next((step for step, ce in curve if ce <= target), None)


def compared(curves: Mapping[str, Curve]) -> dict[str, Any]:
    """The numbers of one seed, from its curves by arm. `half_minus_scratch` is below 0 where half of the steps do
    better."""
    found: dict[str, Any] = {arm: lowest(curve) for arm, curve in curves.items()}
    first = first_at_or_below(curves["whole"], found["scratch"])
    found["half_minus_scratch"] = found["half"] - found["scratch"]
    found["first_step"] = first
    found["share_of_steps"] = None if first is None else first / curves["scratch"][-1][0]
    return found


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and in how many of them half of the steps were enough. No mean of what a seed does not have."""
    found: dict[str, Any] = {"seeds": len(rows), "half_is_enough": sum(row["half_minus_scratch"] <= 0 for row in rows)}
    for key in (*ARMS, "half_minus_scratch", "share_of_steps"):
        values = [row[key] for row in rows]
        found[key] = None if None in values else statistics.fmean(values)
    return found


def compare(workshop: Workshop, images: str, steps: int) -> dict[str, Any]:
    """Chooses the rates by the first seed, trains all runs, and compares them seed by seed."""
    seeds, rates = workshop.options.seeds, workshop.options.rates
    lengths = {"scratch": steps, "half": steps // 2, "frozen": steps // 2, "whole": steps}
    tried = {arm: [Run(images, arm, lengths[arm], rate, seeds[0]) for rate in rates] for arm in ("scratch", "half")}
    curves = workshop.train_all([run for runs in tried.values() for run in runs])
    best = {arm: min(runs, key=lambda run: lowest(curves[run])).rate for arm, runs in tried.items()}
    best["frozen"] = best["whole"] = best["half"]
    runs = {seed: {arm: Run(images, arm, lengths[arm], best[arm], seed) for arm in ARMS} for seed in seeds}
    curves |= workshop.train_all([run for of_seed in runs.values() for run in of_seed.values() if run not in curves])
    rows = [{"seed": s, **compared({arm: curves[run] for arm, run in runs[s].items()})} for s in seeds]
    by_rate = {arm: {f"{run.rate:g}": lowest(curves[run]) for run in runs} for arm, runs in tried.items()}
    return {"steps": steps, "by_rate": by_rate, "rates": best, "rows": rows, "mean": summary(rows)}


def show(images: str, found: dict[str, Any]) -> None:
    rates = found["rates"]
    print(
        f"\n{images}: {found['steps']} steps; base_lr {rates['scratch']:g} from scratch, {rates['half']:g} fine-tuned"
    )
    print("seed  scratch    half  half - scratch  frozen   whole  at the target after")
    for row in [*found["rows"], {"seed": "mean", **found["mean"]}]:
        share = "never" if row["share_of_steps"] is None else f"{100 * row['share_of_steps']:.0f} % of the steps"
        print(
            f"{row['seed']!s:<5} {row['scratch']:7.4f} {row['half']:7.4f}  {row['half_minus_scratch']:+14.4f} "
            f"{row['frozen']:7.4f} {row['whole']:7.4f}  {share}"
        )


def main(options: Options) -> dict[str, Any]:
    start = time.perf_counter()
    workshop = Workshop(options)
    psnr = workshop.make_data()
    print(f"tokenizer: {psnr['digits']:.1f} dB on digits, {psnr['fashion']:.1f} dB on Fashion-MNIST", flush=True)
    digits = workshop.train("digits", "digits", options.digit_steps, "optim.base_lr=1.6e-2")
    print(f"model of digits: held-out CE {lowest(digits):.4f}", flush=True)
    result: dict[str, Any] = {"psnr": psnr, "digits": lowest(digits)}
    lengths: dict[str, int] = {"all": options.steps} | ({"few": options.few_steps} if options.few else {})
    for images, steps in lengths.items():
        result[images] = compare(workshop, images, steps)
    for images in lengths:
        show(images, result[images])
    result["seconds"] = time.perf_counter() - start
    if options.json is not None:
        values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}
        write_json(options.json, {"cpu": cpu_name(), "options": values, **result})
    return result


if __name__ == "__main__":
    entry.run(lambda: main(tyro.cli(Options, description=__doc__)))
