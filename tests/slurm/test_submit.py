"""`mepa slurm`: what is refused before it is submitted, what SLURM accepts, a submitted run, a whole pipeline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mepa_ds.config.base import apply_overrides, load_config
from mepa_ds.slurm.in_job.cause import cause_of
from mepa_ds.slurm.jobs import Job, sbatch_command
from mepa_ds.slurm.pipeline import PipelineConfig
from mepa_ds.slurm.profile import read_profile
from tests import tiny_run
from tests.evaluation.inception_weights import write_random_weights
from tests.slurm.bed import ROOT, STEPS, Bed, Run, scenario
from tests.train_tokenizer import training_run as tokenizer_run

SCRIPTS = ("pretrain", "train_tokenizer", "build_shards", "precompute", "generate_evaluate", "scaling_study")
# Many command lines in one process: each would spend seconds on imports.
_MANY = """
import json, sys
from mepa_ds.cli.slurm import main
from mepa_ds.errors import UserError
for argv in json.loads(sys.argv[1]):
    try:
        main(argv)
    except UserError as error:
        print("REFUSED " + json.dumps(str(error)))
"""


def profile_file(folder: Path, name: str, **values: object) -> str:
    path = folder / f"{name}.env"
    text = (ROOT / "slurm/clusters/ci.env").read_text()
    path.write_text(text + "".join(f"MEPA_{key}={value}\n" for key, value in values.items()))
    return str(path)


def refusals(bed: Bed, commands: list[list[str]]) -> list[str]:
    """The message that each `mepa slurm submit` ends with."""
    words = [sys.executable, "-c", _MANY, json.dumps(commands)]
    output = bed.cluster.check(*words, env=bed.environment, timeout=240)
    found = [json.loads(line.removeprefix("REFUSED ")) for line in output.splitlines() if line.startswith("REFUSED")]
    assert len(found) == len(commands), output
    return found


def test_bad_input_is_refused_at_submit_time(bed: Bed) -> None:
    folder, recipe = bed.folder / "profiles", str(bed.recipe)
    folder.mkdir()
    (folder / "typo.env").write_text("MEPA_PARTITON=gpu\n")
    (folder / "torn.env").write_text("MEPA_PARTITION=gpu queue\n")
    mixed = {"PARTITION": "mixed", "GPUS_PER_NODE": 4}
    profiles = {
        "lost": profile_file(folder, "lost", PARTITION="gpus"),
        "mixed": profile_file(folder, "mixed", **mixed),
        "small": profile_file(folder, "small", PARTITION="mixed", GPUS_PER_NODE=8, GPU_TYPE="a100"),
        "elsewhere": profile_file(folder, "elsewhere", SHARED_PATHS="'/home /scratch'"),
        "launcher": profile_file(folder, "launcher", LAUNCHER="mpirun"),
    }
    (folder / "manifest.txt").write_text(f"{recipe} model.dept=3\n{recipe}\n")

    def submit(cluster: str, *more: str) -> list[str]:
        return ["submit", recipe, "--cluster", cluster, *more]

    cases = [
        (submit("h200"), "--cluster h200: no profile"),
        (submit(str(folder / "typo.env")), "unknown key MEPA_PARTITON; did you mean MEPA_PARTITION?"),
        (submit(str(folder / "torn.env")), "torn.env:1: expected KEY=value with quotes around blanks"),
        (submit(profiles["launcher"]), "MEPA_LAUNCHER=mpirun: expected srun or torchrun"),
        (
            submit(profiles["lost"]),
            "no partition 'gpus' on this cluster; its partitions: gpu, failing, urgent, big, mixed",
        ),
        (submit(profiles["mixed"]), "mixes 4 a100 and 8 h100 a node; choose one of them with MEPA_GPU_TYPE"),
        (submit(profiles["small"]), "has only 0 nodes with 8 a100 a node (its nodes: 2 with 4 a100)"),
        (submit("ci", "--nodes", "3"), "--nodes 3: partition gpu has only 2 nodes with 2 GPUs a node"),
        (submit("ci", "--nodes", "0"), "--nodes 0: expected at least 1"),
        (submit(profiles["elsewhere"]), "is not visible from the nodes"),
        (submit("ci", "--", "data.tokens=nowhere"), "data.tokens: nowhere: no such file or directory; make it first"),
        (submit("ci", "--", "model.dept=3"), "model.dept: unknown key; did you mean 'depth'?"),
        (submit("ci", "--", "parallel.ep_size=4"), "parallel.ep_size (4) must divide the number of ranks (2)"),
        (submit("ci", "--", "train.global_batch=9"), "train.global_batch (9) must be a multiple of ranks"),
        (submit("ci", "--", "model.width=8192", "model.num_heads=128"), "does not fit: a rank needs"),
        (submit("ci", "--time", "never"), "sbatch: Invalid --time specification"),
        (["submit", str(folder / "manifest.txt"), "--job", "scaling-study", "--cluster", "ci"], "run 1: "),
        (["submit", str(folder / "absent.yaml"), "--cluster", "ci"], "cannot read the recipe"),
        (["status", str(folder)], "no job was submitted for it"),
    ]
    for (_, expected), message in zip(cases, refusals(bed, [argv for argv, _ in cases]), strict=True):
        assert expected in message
    assert bed.cluster.run("squeue", "-h", "-o", "%j").stdout.count("mepa-run") == 0


def test_a_mixed_partition_is_fine_once_the_type_is_named(bed: Bed) -> None:
    named = profile_file(bed.folder, "named", PARTITION="mixed", GPUS_PER_NODE=2, GPU_TYPE="a100")
    code, output = bed.mepa("submit", bed.recipe, "--cluster", named, "--dry-run", "--", "parallel.ep_size=2")
    assert code == 0, output
    assert "--gpus-per-node=a100:2" in output
    assert "submitted" not in output


@pytest.mark.parametrize("nodes", [1, 4, 32])
def test_slurm_accepts_every_script(bed: Bed, nodes: int) -> None:
    """On nodes of 8 GPUs, as an array too, with the lines that `mepa slurm` writes."""
    path = profile_file(
        bed.folder, f"big{nodes}", PARTITION="big", GPUS_PER_NODE=8, GPU_TYPE="h100", CPUS_PER_GPU=12, TIME="24:00:00"
    )
    profile = read_profile(path)
    for script in SCRIPTS:
        array = "0-99%8" if script in SCRIPTS[2:] else None
        job = Job(script, ("a", "b"), bed.folder, f"mepa-{script}", nodes=nodes, array=array)
        words = [word for word in sbatch_command(job, profile)[1:] if word != "--parsable"]
        result = bed.cluster.run("sbatch", "--test-only", *words)
        assert result.returncode == 0, f"{script}: {result.stderr}"
        assert f"using {nodes * 8 * 12} processors" in result.stderr


def test_scripts_are_clean() -> None:
    """shellcheck has nothing to say."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (.ci/run names the package)")
    folder = ROOT / "slurm"
    files = [*folder.glob("*.sh"), *folder.glob("*.sbatch"), *(folder / "clusters").glob("*.env")]
    assert len(files) >= 10
    result = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@dataclass
class Submitted:
    run: Run
    first: str
    second: str
    during: str


@scenario
def submitted(bed: Bed) -> Submitted:
    """`slurm/submit.sh` with staging, a second try while the first is at work, and the status at the end."""
    output, gates = bed.folder / "submitted", bed.gates("submitted", "step_6")
    cluster = profile_file(bed.folder, "submitted", PYTHON=bed.python_with(gates))
    words: list[str | Path] = [
        bed.recipe,
        "--cluster",
        cluster,
        "--stage",
        "--",
        f"output_dir={output}",
        "parallel.ep_size=2",
    ]
    first = bed.cluster.check("slurm/submit.sh", *words, env=bed.environment, timeout=240)
    number = first.split("job ")[1].split()[0]
    run = Run(bed, number, output, output / "slurm" / f"mepa-submitted-{number}.log")
    gates.wait("step_6", 2)
    _, second = bed.mepa("submit", *words)
    _, during = bed.mepa("status", output)
    gates.open("step_6")
    run.wait()
    return Submitted(run, first, second, during)


def test_submitted(bed: Bed, outcome: Callable[[str], Any]) -> None:
    result = outcome("submitted")
    run = result.run
    assert run.wait() == "COMPLETED", run.text
    assert len(run.losses) == STEPS
    assert "plan: 2 ranks" in result.first
    assert run.text.count(f"-> /mnt/mepa_ds-{os.getuid()}/shards/") == 3
    assert "data.tokens: /mnt" in (run.output / "resolved.yaml").read_text().replace(
        "\n  tokens: ", "\n  data.tokens: "
    )
    record = json.loads((run.output / "slurm/jobs.jsonl").read_text().splitlines()[0])
    assert record["job"] == run.job
    assert f"job {run.job} (mepa-submitted) is already at work" in result.second
    assert "RUNNING" in result.during
    code, text = bed.mepa("status", run.output, "--json")
    assert code == 0, text
    status = json.loads(text)
    assert (status["state"], status["result"], status["restarts"]) == ("COMPLETED", "done", 0)
    assert status["step"] == "40 of 40"
    assert status["time left"] == "0:00:00"
    assert status["last checkpoint"].endswith("step_00000040")
    assert status["last error"] == "none"
    assert status["images per second"] > 0


def write_pipeline(folder: Path) -> Path:
    """Images of three classes, one of them damaged; recipes of a tokenizer and a model; a pipeline over all."""
    rng = np.random.default_rng(0)
    from PIL import Image

    for number in range(24):
        path = folder / "images" / f"class{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    (folder / "images/class1/01.png").write_bytes(b"not an image")
    sets = folder / "sets"
    tokenizer = tokenizer_run.recipe(folder, "train.steps=2", f"output_dir={folder / 'tokenizer'}")
    tokenizer["data"] |= {"images": str(sets / "train"), "heldout_images": None}
    (folder / "tokenizer.yaml").write_text(yaml.safe_dump(tokenizer))
    model = apply_overrides(
        tiny_run.recipe_values(folder),
        [
            f"output_dir={folder / 'model'}",
            f"tokenizer={folder / 'tokenizer'}",
            f"data.tokens={sets / 'train.tokens-tokenizer'}",
            f"data.features={sets / 'train.features-patch-pca'}",
            "data.heldout_tokens=null",
            "model.scales=[1,2,4]",
            "train.steps=2",
        ],
    )
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    images, teacher = sets / "train", folder / "teacher"
    fit = f"fit-teacher patch-pca {images} --grid-side 4 --width 6 --out {teacher}"
    features = f"features {images} --teacher patch-pca --weights {teacher} --codec fp16"
    source = f"imagefolder --root {folder / 'images'} --out {images} --shard-samples 8"
    pipeline: dict[str, Any] = {
        "shards": {"commands": [source], "parts": 3, "cpus": 1},
        "tokenizer": {"recipe": str(folder / "tokenizer.yaml")},
        "teacher": {"commands": [fit], "cpus": 1},
        "precompute": {"commands": [f"tokens {images} --tokenizer {folder / 'tokenizer'}", features], "cpus": 1},
        "pretrain": {"recipe": str(folder / "model.yaml"), "nodes": 1},
        "samples": {"parts": 2, "per_class": 2, "weights": "last"},
    }
    np.savez(folder / "real.npz", arr_0=rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    weights = write_random_weights(folder / "inception.pth")
    pipeline["samples"]["evaluate"] = {"reference": str(folder / "real.npz"), "inception": str(weights)}
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline))
    return path


@dataclass
class Pipeline:
    folder: Path
    first: list[dict[str, str]]
    check_log: str
    restarts: int
    second: list[dict[str, str]]
    third: str


@scenario
def pipeline(bed: Bed) -> Pipeline:
    """Started with a damaged image among its input, which one part stops at; mended, and started again."""
    folder = bed.folder / "pipeline"
    folder.mkdir()
    words: list[str | Path] = ["pipeline", write_pipeline(folder), "--cluster", "ci"]

    def start() -> list[dict[str, str]]:
        code, text = bed.mepa(*words)
        assert code == 0, text
        jobs = [json.loads(line) for line in (folder / "model/slurm/jobs.jsonl").read_text().splitlines()]
        for line in jobs:
            line["end"] = bed.cluster.wait_job(line["job"])
        return jobs

    first = start()
    check_log = (Path(first[1]["state"]) / f"mepa-shards-check-{first[1]['job']}.log").read_text()
    restarts = max(int(member["Restarts"]) for member in bed.cluster.members(first[0]["job"]))
    shutil.copy(folder / "images/class0/00.png", folder / "images/class1/01.png")
    second = start()[len(first) :]
    return Pipeline(folder, first, check_log, restarts, second, bed.mepa(*words)[1])


def test_pipeline(outcome: Callable[[str], Any]) -> None:
    result = outcome("pipeline")
    # The job after the array says which member failed and why; nothing after it ran.
    assert [job["end"] for job in result.first[:2]] == ["FAILED", "FAILED"]
    assert {job["end"] for job in result.first[2:]} == {"CANCELLED"}
    last = result.check_log.splitlines()[-1]
    assert "1 of 3 parts are not done" in last
    assert "class1/01.png" in last
    assert result.restarts == 0  # a mistake in the data, not a crash
    failed = last.split("not done: ")[1].split()[0]
    # Started again, only that member runs, and then the rest of the chain.
    assert f"--array={failed}" in result.second[0]["command"]
    assert {job["end"] for job in result.second} == {"COMPLETED"}
    with np.load(Path(result.second[-1]["state"]) / "samples.npz") as file:
        images = file["arr_0"]
    assert (images.shape, images.dtype) == ((6, 8, 8, 3), np.uint8)
    (scores,) = (json.loads(path.read_text()) for path in Path(result.second[-1]["state"]).glob("scores-*.json"))
    assert scores["num_samples"] == 6
    assert scores["fid"] > 0
    assert "all stages are done" in result.third


@scenario
def study(bed: Bed) -> tuple[Run, str]:
    """Two runs of one step, one at a time."""
    manifest = bed.folder / "study.txt"
    line = f"{bed.recipe} train.steps=1 output_dir={bed.folder}/study"
    manifest.write_text(f"# two seeds\n{line}_0 seed=0\n{line}_1 seed=1\n")
    code, text = bed.mepa(
        "submit", manifest, "--job", "scaling-study", "--cluster", "ci", "--gpus", "1", "--limit", "1"
    )
    assert code == 0, text
    check = text.rpartition("job ")[2].split()[0]
    log = bed.folder / "study.slurm" / f"mepa-study-check-{check}.log"
    run = Run(bed, check, bed.folder / "study_0", log)
    run.wait()
    return run, text


def test_study(bed: Bed, outcome: Callable[[str], Any]) -> None:
    run, text = outcome("study")
    assert "--array=0-1%1" in text
    assert run.wait() == "COMPLETED", run.text
    assert "all 2 parts are done" in run.text
    assert all((bed.folder / f"study_{n}/last").is_dir() for n in range(2))


CAUSES = {
    "step 1\nerror: data.tokens: nowhere\nsrun: error: n1: task 0: Exited": "data.tokens: nowhere",
    "[rank1]: Traceback\n[rank1]: KeyError: 'x'\n[rank0]: RuntimeError: Connection closed": "KeyError: 'x'",
    "  raise ValueError('no')\ntorch.OutOfMemoryError: CUDA": "torch.OutOfMemoryError: CUDA",
    "slurmstepd: error: Detected 1 oom-kill event(s)": "slurmstepd: error: Detected 1 oom-kill event(s)",
    "usage: x\npretrain.py: error: recipe is required": "recipe is required",
    "│ Missing from build_shards.py imagefolder:      │\n│ --root │": "Missing from build_shards.py imagefolder:",
    "srun: error: n1: task 0: Exited with exit code 1\nall well": None,
    "[rank1]:[E1103 12:00:00.0 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=7)\nterminate called": "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
    "terminate called after throwing an instance of 'c10::DistBackendError'\n  what():  NCCL error: unhandled": (
        "NCCL error: unhandled"
    ),
    "Fatal Python error: Segmentation fault\n\nCurrent thread": "Fatal Python error: Segmentation fault",
}


@pytest.mark.parametrize("log", CAUSES)
def test_the_cause_of_a_failure(log: str) -> None:
    """The first error is named, not what it took down."""
    assert cause_of(log) == CAUSES[log]


def test_the_examples_are_valid() -> None:
    assert load_config(PipelineConfig, ROOT / "slurm/pipeline_imagenet256.yaml").samples is not None
    for path in (ROOT / "slurm/clusters").glob("*.env"):
        assert read_profile(path.stem).gpus_per_node > 0
