"""`mepa quickstart`: the whole system on real images, stage by stage, with the commands that a user would type."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mepa_ds.errors import UserError
from mepa_ds.files import write_json

RUNS = Path("runs/quickstart")
IMAGES = Path("data/digits-32")
STAGES_FILE = RUNS / "stages.json"
RANKS = 2
TORCHRUN = f"-m torch.distributed.run --standalone --nproc-per-node {RANKS}"


@dataclass(frozen=True)
class Stage:
    """Commands (words after the Python interpreter), and the files that are there when they are done."""

    name: str
    meaning: str
    commands: tuple[str, ...]
    results: tuple[Path, ...]


PRECOMPUTE = "data_tools/precompute.py"
STAGES = (
    Stage(
        "shards",
        "scikit-learn's handwritten digits as WebDataset shards",
        tuple(
            f"data_tools/build_shards.py digits --split {split} --out {IMAGES / split}"
            for split in ("train", "heldout")
        ),
        (IMAGES / "train/index.json", IMAGES / "heldout/index.json"),
    ),
    Stage(
        "tokenizer",
        "a small multi-scale VQVAE on them",
        (f"{TORCHRUN} -m mepa_ds train-tokenizer recipes/tokenizer_quickstart.yaml",),
        (RUNS / "tokenizer/model.safetensors",),
    ),
    Stage(
        "precompute",
        "token maps, and features of a patch-PCA teacher, beside the images",
        (
            f"{PRECOMPUTE} fit-teacher patch-pca {IMAGES}/train --grid-side 4 --out {RUNS}/teacher",
            f"{PRECOMPUTE} features {IMAGES}/train --teacher patch-pca --weights {RUNS}/teacher --codec int8",
            f"{PRECOMPUTE} tokens {IMAGES}/train --tokenizer {RUNS}/tokenizer",
            f"{PRECOMPUTE} tokens {IMAGES}/heldout --tokenizer {RUNS}/tokenizer",
        ),
        tuple(
            IMAGES / name / "index.json"
            for name in ("train.features-patch-pca", "train.tokens-tokenizer", "heldout.tokens-tokenizer")
        ),
    ),
    Stage(
        "pretraining",
        f"a nano MEPA under DeepSpeed on {RANKS} CPU ranks",
        (f"{TORCHRUN} pretrain.py recipes/quickstart.yaml",),
        (RUNS / "pretrain/last/model.safetensors", RUNS / "pretrain/best/model.safetensors"),
    ),
    Stage(
        "samples",
        "a grid of generated digits, one row a class",
        (
            f"-m mepa_ds sample --weights {RUNS}/pretrain/best --tokenizer {RUNS}/tokenizer --per-class 10 "
            f"--out {RUNS}/samples.png",
        ),
        (RUNS / "samples.png",),
    ),
)


def main(argv: list[str]) -> None:
    if argv:
        print(__doc__ + "\n\nusage: mepa quickstart     (no options; run it in a clone of the repository)")
        sys.exit(0 if argv[0] in ("-h", "--help") else 2)
    if not Path("recipes/quickstart.yaml").exists():
        raise UserError("recipes/quickstart.yaml: not found; run the quickstart in a clone of the repository")
    seconds = _read_seconds()
    for number, stage in enumerate(STAGES, start=1):
        _run(stage, f"[{number}/{len(STAGES) + 1}]", seconds)
    _report(f"[{len(STAGES) + 1}/{len(STAGES) + 1}]", seconds)


def _read_seconds() -> dict[str, float]:
    """Wall time of the stages that an earlier start finished."""
    return json.loads(STAGES_FILE.read_text()) if STAGES_FILE.exists() else {}


def _run(stage: Stage, place: str, seconds: dict[str, float]) -> None:
    if stage.name in seconds and all(path.exists() for path in stage.results):
        print(f"{place} {stage.name}: finished before, skipped", flush=True)
        return
    print(f"{place} {stage.name}: {stage.meaning}", flush=True)
    # Threads that wait by spinning slow everything down several times when other programs want the cores too.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    started = time.perf_counter()
    for command in stage.commands:
        print(f"      $ python {command}", flush=True)
        code = subprocess.run([sys.executable, *shlex.split(command)], env=environment, check=False).returncode
        if code:
            raise UserError(
                f"quickstart: stage {stage.name} ended with status {code} (its own message is above); "
                "run the quickstart again: it goes on from here"
            )
    seconds[stage.name] = round(time.perf_counter() - started, 2)
    write_json(STAGES_FILE, seconds)
    print(f"{place} {stage.name}: done in {seconds[stage.name]:.1f} s", flush=True)


def _report(place: str, seconds: dict[str, float]) -> None:
    from mepa_ds.cli.digits_agreement import digits_agreement
    from mepa_ds.loops.run_report import format_report, run_report

    print(f"{place} report: 500 more digits, judged by a classifier of real ones", flush=True)
    started = time.perf_counter()
    judged = digits_agreement(
        RUNS / "pretrain/best", RUNS / "tokenizer", train=IMAGES / "train", heldout=IMAGES / "heldout"
    )
    report: dict[str, Any] = {**run_report(RUNS / "pretrain"), **_tokenizer_scores(), **judged}
    seconds["report"] = round(time.perf_counter() - started, 2)
    report["stage_seconds"] = {**seconds, "total": round(sum(seconds.values()), 2)}
    write_json(RUNS / "report.json", report)
    print(format_report(report))
    print(f"\nsamples: {RUNS / 'samples.png'}\nreport:  {RUNS / 'report.json'}")


def _tokenizer_scores() -> dict[str, float]:
    from mepa_ds.metrics import read_metrics

    records = [r for r in read_metrics(RUNS / "tokenizer/metrics.jsonl") if r.get("event") == "heldout"]
    return {"tokenizer_psnr": records[-1]["psnr"], "tokenizer_codebook_use": records[-1]["codebook_use"]}
