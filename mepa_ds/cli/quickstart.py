"""`mepa quickstart`: the whole system on real images, stage by stage, with the commands that a user would type."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mepa_ds import log, shipped
from mepa_ds.command_line import entry
from mepa_ds.errors import UserError
from mepa_ds.files import make_way, write_json
from mepa_ds.interrupts import Interrupted
from mepa_ds.machine import peak_resident_bytes

RUNS = Path("runs/quickstart")
IMAGES = Path("data/digits-32")
SCORES = RUNS / "scores.json"
STAGES_FILE = RUNS / "progress.json"
RANKS = 2
TORCHRUN = f"-m torch.distributed.run --standalone --nproc-per-node {RANKS}"


@dataclass(frozen=True)
class Stage:
    """Commands (the words after the Python interpreter) and their outputs."""

    name: str
    meaning: str
    commands: tuple[str, ...]
    outputs: tuple[Path, ...]
    results: tuple[Path, ...]
    """Files in `outputs` that are there when the commands are done."""


@dataclass
class Spent:
    """Time and memory that a stage has taken, over all its starts."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    """Peak memory of the largest process."""
    done: bool = False
    work: str = ""
    """Hash of its commands and recipes at its last start."""


PRECOMPUTE = "-m mepa_ds.data_tools.precompute"
SETS = ("train.features-patch-pca", "train.tokens-tokenizer", "heldout.tokens-tokenizer")
STAGES = (
    Stage(
        "shards",
        "scikit-learn's handwritten digits as WebDataset shards",
        tuple(
            f"-m mepa_ds.data_tools.build_shards digits --split {split} --out {IMAGES / split}"
            for split in ("train", "heldout")
        ),
        (IMAGES / "train", IMAGES / "heldout"),
        (IMAGES / "train/index.json", IMAGES / "heldout/index.json"),
    ),
    Stage(
        "tokenizer",
        "a small multi-scale VQVAE on them",
        (f"{TORCHRUN} -m mepa_ds train-tokenizer recipes/tokenizer_quickstart.yaml",),
        (RUNS / "tokenizer",),
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
        (RUNS / "teacher", *(IMAGES / name for name in SETS)),
        tuple(IMAGES / name / "index.json" for name in SETS),
    ),
    Stage(
        "pretraining",
        f"a nano MEPA under DeepSpeed on {RANKS} CPU ranks",
        (f"{TORCHRUN} -m mepa_ds pretrain recipes/quickstart.yaml",),
        (RUNS / "pretrain",),
        (RUNS / "pretrain/last/model.safetensors", RUNS / "pretrain/best/model.safetensors"),
    ),
    Stage(
        "samples",
        "a grid of generated digits, one row a class, and 50 of each class as files",
        tuple(
            f"-m mepa_ds sample --weights {RUNS}/pretrain/best --tokenizer {RUNS}/tokenizer --per-class {count} "
            f"--out {RUNS}/{out}"
            for count, out in ((10, "samples.png"), (50, "samples"))
        ),
        (RUNS / "samples.png", RUNS / "samples"),
        (RUNS / "samples.png", RUNS / "samples"),
    ),
    Stage(
        "scores",
        "a classifier of real digits judges them, and its features compare them with held-out ones",
        (
            f"-m mepa_ds evaluate --fit-classifier {IMAGES}/train --heldout {IMAGES}/heldout --out {RUNS}/classifier",
            f"-m mepa_ds evaluate {RUNS}/samples --reference {IMAGES}/heldout --features classifier:{RUNS}/classifier "
            f"--classifier {RUNS}/classifier --json {SCORES}",
        ),
        (RUNS / "classifier", SCORES),
        (RUNS / "classifier/config.json", SCORES),
    ),
)


def main(argv: list[str]) -> None:
    if argv:
        print(__doc__ + f"\n\nusage: mepa quickstart     (no options; it writes to {IMAGES.parent}/ and {RUNS}/ here)")
        sys.exit(0 if argv[0] in ("-h", "--help") else 2)
    log.make_stdout_a_log()
    spent = _read_spent()
    for number, stage in enumerate(STAGES, start=1):
        place = f"[{number}/{len(STAGES) + 1}]"
        if spent[stage.name].work not in ("", _work(stage)):
            print(f"{place} {stage.name}: its recipe has changed, it starts anew", flush=True)
            _forget([stage], spent)
        if spent[stage.name].done and all(path.exists() for path in stage.results):
            print(f"{place} {stage.name}: finished before, skipped", flush=True)
        else:
            was_done = spent[stage.name].done  # it was, but its results have been removed since
            _forget(STAGES[number - 1 if was_done else number :], spent)
            _run(stage, place, spent)
    _report(f"[{len(STAGES) + 1}/{len(STAGES) + 1}]", spent)


def _work(stage: Stage) -> str:
    recipes = [Path(word) for command in stage.commands for word in shlex.split(command) if word.endswith(".yaml")]
    text = "\n".join([*stage.commands, *(shipped.find(path).read_text() for path in recipes)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_spent() -> dict[str, Spent]:
    """Time and memory by stage, from earlier starts."""
    known = json.loads(STAGES_FILE.read_text()) if STAGES_FILE.exists() else {}
    return {stage.name: Spent(**known.get(stage.name, {})) for stage in STAGES}


def _write_spent(spent: dict[str, Spent]) -> None:
    write_json(STAGES_FILE, {name: asdict(stage) for name, stage in spent.items()})


def _forget(stages: Sequence[Stage], spent: dict[str, Spent]) -> None:
    """Removes the outputs of stages whose inputs are made anew: a report must not mix two runs."""
    for stage in stages:
        spent[stage.name] = Spent()
        for path in stage.outputs:
            make_way(path)


def _run(stage: Stage, place: str, spent: dict[str, Spent]) -> None:
    print(f"{place} {stage.name}: {stage.meaning}", flush=True)
    mine = spent[stage.name]
    mine.work = _work(stage)
    before, started = mine.seconds, time.perf_counter()
    for command in stage.commands:
        print(f"      $ python {command}", flush=True)
        try:
            code, peak = _python(command)
            mine.peak_memory_bytes = max(mine.peak_memory_bytes, peak)
        finally:  # an interrupted start counts too
            mine.seconds = round(before + time.perf_counter() - started, 2)
            _write_spent(spent)
        if code:
            raise UserError(
                f"quickstart: stage {stage.name} ended with status {code} (its own message is above); "
                "run the quickstart again: it continues here"
            )
    mine.done = True
    _write_spent(spent)
    print(f"{place} {stage.name}: done in {mine.seconds:.1f} s", flush=True)


def _python(command: str) -> tuple[int, int]:
    """Runs Python with these words; its exit status, and the bytes of memory of its largest process."""
    # Threads that wait by spinning slow everything down several times when other programs want the cores too.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if command.startswith(TORCHRUN):  # torchrun would set the same, and say so in five lines
        environment.setdefault("OMP_NUM_THREADS", "1")
    with subprocess.Popen([sys.executable, *shlex.split(command)], env=environment) as process:
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except Interrupted as interrupt:  # the command saves what it has; a terminal's Ctrl-C has reached it already
            if interrupt.number != signal.SIGINT or not sys.stdin.isatty():
                process.send_signal(interrupt.number)
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024


def _report(place: str, spent: dict[str, Spent]) -> None:
    from mepa_ds.reports.run_report import format_report, run_report

    print(f"{place} report", flush=True)
    started = time.perf_counter()
    report: dict[str, Any] = {**run_report(RUNS / "pretrain"), **_tokenizer_scores(), **_scores()}
    stages = {**spent, "report": Spent(round(time.perf_counter() - started, 2), peak_resident_bytes())}
    seconds = {name: stage.seconds for name, stage in stages.items()}
    report["stage_seconds"] = {**seconds, "total": round(sum(seconds.values()), 2)}
    report["stage_peak_memory"] = {f"{name}_bytes": stage.peak_memory_bytes for name, stage in stages.items()}
    write_json(RUNS / "report.json", report)
    print(format_report(report))
    print(f"\nsamples: {RUNS / 'samples.png'}\nreport:  {RUNS / 'report.json'}")


def _scores() -> dict[str, float]:
    scores = json.loads(SCORES.read_text())
    return {name: scores[name] for name in ("class_agreement", "classifier_heldout_accuracy", "classifier.fd")}


def _tokenizer_scores() -> dict[str, float]:
    from mepa_ds.runtime.metrics import read_metrics

    records = [r for r in read_metrics(RUNS / "tokenizer/metrics.jsonl") if r.get("event") == "heldout"]
    return {"tokenizer_psnr": records[-1]["psnr"], "tokenizer_codebook_use": records[-1]["codebook_use"]}


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
