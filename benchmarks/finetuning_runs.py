"""The data and the runs of benchmarks/finetuning.py, made by the public commands in one directory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from mepa_ds.errors import UserError
from mepa_ds.runtime.metrics import METRICS_NAME, read_metrics
from mepa_ds.safety.reading import read_json

ROOT = Path(__file__).parent.parent
EVALUATIONS = 20
"""Of a run, evenly over its steps."""
BATCH = 32
MODEL = ("model.depth=4", "model.width=128", "model.num_heads=4", f"train.global_batch={BATCH}")
ARMS = ("scratch", "half", "frozen", "whole")
_TIMEOUT = 3600.0
Curve = Sequence[tuple[int, float]]
"""(step, held-out CE) of every evaluation."""


@dataclass(frozen=True)
class Options:
    """Compare fine-tuning with training from scratch."""

    out: Path = Path("runs/benchmarks/finetuning")
    """Data and runs. What is there is not made again, so give other options of data another directory."""
    json: Path | None = None
    """Write the numbers here."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial weights, order and dropout; one model of digits starts them all."""
    steps: int = 600
    """Of a run from scratch on all images."""
    few: int = 500
    """Images of the small data set; 0 leaves it out."""
    few_steps: int = 300
    """Of a run from scratch on these."""
    digit_steps: int = 400
    """Of the model of digits."""
    tokenizer_steps: int = 600
    """Of the tokenizer, at 16 images."""
    train_images: int = 20_000
    """Of Fashion-MNIST, to train on."""
    rates: tuple[float, ...] = (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    """Values of optim.base_lr to choose from; an eighth of it is the peak at 32 images a step."""
    jobs: int = 2
    """Runs at a time, of one thread each."""
    fashion: Path = Path("/usr/share/datasets/fashion-mnist")
    """Fashion-MNIST in its four files (Debian and Ubuntu: apt-get install dataset-fashion-mnist)."""


@dataclass(frozen=True)
class Run:
    """One training run on Fashion-MNIST."""

    images: str
    """All or few."""
    arm: str
    """One of ARMS."""
    steps: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.images}_{self.arm}_{self.steps}_rate{self.rate:g}_seed{self.seed}"


class Workshop:
    """The directory of data and runs, and the commands that fill it."""

    def __init__(self, options: Options):
        self.options, self.out = options, options.out.absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        self._processes: list[subprocess.Popen[bytes]] = []

    def command(self, *words: object) -> None:
        """Runs `mepa` with these words, on one thread; its output goes to OUT/log.txt."""
        line = [str(word) for word in words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MEPA_ACCELERATOR": "cpu"}
        with (self.out / "log.txt").open("ab") as log:
            call = [sys.executable, "-m", "mepa_ds", *line]
            process = subprocess.Popen(call, cwd=ROOT, env=environment, stdout=log, stderr=log)
            self._processes.append(process)
            try:
                status = process.wait(_TIMEOUT)
            except BaseException:
                process.terminate()
                raise
        if status:
            raise UserError(f"mepa {' '.join(line)}: ended with {status}; its words are in {self.out}/log.txt")

    def stop(self) -> None:
        """Ends what is running; runs save a checkpoint, and the next start of the benchmark continues them."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()

    def make(self, result: Path, *words: object) -> Path:
        """Runs the command unless its result is there."""
        if not result.exists():
            print(f"making {result.relative_to(self.out)}", flush=True)
            self.command(*words)
        return result

    def make_data(self) -> dict[str, float]:
        """Images, the tokenizer and tokens of both sets. Returns PSNR by data set, of held-out images."""
        options, data, tokenizer = self.options, self.out / "data", self.out / "tokenizer"
        counts = {"train": options.train_images, "heldout": 1000}
        for split, prefix in (("train", "train"), ("heldout", "t10k")):
            files = [options.fashion / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
            words = ["--first", counts[split], "--images", files[0], "--labels", files[1]]
            fashion, digits = data / f"fashion/{split}", data / f"digits/{split}"
            self.make(fashion / "index.json", "data", "build", "idx", "--out", fashion, *words)
            self.make(digits / "index.json", "data", "build", "digits", "--out", digits, "--split", split)
        shards = f"{data}/{{fashion/train/shard-{{000000..000002}},digits/train/shard-{{000000..000001}}}}.tar"
        words = ["--shards", shards, "--classes", data / "fashion/train", "--out", data / "both"]
        self.make(data / "both/index.json", "data", "build", "webdataset", *words)
        settings = [
            f"output_dir={tokenizer}",
            f"data.images={data}/both",
            f"data.heldout_images={data}/fashion/heldout",
        ]
        settings += [f"train.steps={options.tokenizer_steps}", f"log.evaluate_every={options.tokenizer_steps}"]
        recipe = "recipes/studies/toy_tokenizer.yaml"
        self.make(tokenizer / "config.json", "train-tokenizer", recipe, *settings)
        psnr = {}
        for name, split in product(("digits", "fashion"), ("train", "heldout")):
            words = ["data", "precompute", "tokens", data / name / split, "--tokenizer", tokenizer]
            self.make(data / name / f"{split}.tokens-tokenizer/index.json", *words)
        for name in ("digits", "fashion"):
            scores = self.out / f"reconstructions_{name}"
            words = ["evaluate-tokenizer", tokenizer, data / name / "heldout", "--out", scores]
            found = read_json(self.make(scores / "scores.json", *words))
            psnr[name] = found["psnr"]
        return psnr

    def train(self, name: str, data: str, steps: int, *settings: str) -> Curve:
        """Trains the run, or continues it, unless it has ended. Returns its held-out CE."""
        curve = self.curve(name)
        if not curve or curve[-1][0] < steps:
            tokens, every = self.out / "data" / data, max(1, steps // EVALUATIONS)
            paths = [f"output_dir={self.out}/runs/{name}", f"tokenizer={self.out}/tokenizer"]
            paths.append(f"data.tokens={tokens}/train.tokens-tokenizer")
            paths.append(f"data.heldout_tokens={tokens}/heldout.tokens-tokenizer")
            length = [f"train.steps={steps}", f"log.evaluate_every={every}", f"log.checkpoint_every={steps}"]
            self.command("pretrain", "recipes/studies/toy_base.yaml", *paths, *MODEL, *length, *settings)
        return self.curve(name)

    def curve(self, name: str) -> Curve:
        records = read_metrics(self.out / "runs" / name / METRICS_NAME)
        return [(record["step"], record["ce"]) for record in records if record["event"] == "heldout"]

    def train_all(self, runs: Sequence[Run]) -> dict[Run, Curve]:
        """Several runs at a time; each is told when it has ended."""
        with ThreadPoolExecutor(self.options.jobs) as pool:
            futures = [pool.submit(self._one, run) for run in runs]
            try:
                return {run: future.result() for run, future in zip(runs, futures, strict=True)}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise

    def _one(self, run: Run) -> Curve:
        settings, start = [f"seed={run.seed}", f"optim.base_lr={run.rate:g}"], time.perf_counter()
        if run.arm != "scratch":
            settings += [f"init_weights={self.out}/runs/digits/best", "init_missing=classes"]
        if run.arm == "frozen":
            settings.append("optim.freeze=['blocks.[0-1].*']")
        if run.images == "few":
            settings.append(f"data.unique_images={self.options.few}")
        curve = self.train(run.name, "fashion", run.steps, *settings)
        print(f"{run.name:<40} held-out CE {lowest(curve):.4f}  {time.perf_counter() - start:5.0f} s", flush=True)
        return curve


def lowest(curve: Curve) -> float:
    """That of the weights in RUN/best."""
    return min(ce for _, ce in curve)
