"""The toy study, cut to twelve short runs: from images to the report, by the commands that a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from mepa_ds.scaling.columns import COLUMNS
from tests.scaling.idx_fixtures import first_images
from tests.tiny_run import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.slow]  # its parts have tests in running/, laws/ and report/


def mepa(*words: object, timeout: float = 280) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mepa_ds", *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recipe(folder: Path, name: str, **changes: Any) -> Path:
    """A recipe of recipes/studies with other values, written to `folder`."""
    values = yaml.safe_load((ROOT / "recipes/studies" / name).read_text())
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            values[section][leaf] = value
        else:
            values[section] = value
    path = folder / name
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study file, with shards, tokenizer and tokens made."""
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = folder / "tokenizer"
    for name, split, count in (("train", "train", 1200), ("heldout", "t10k", 256)):
        images, labels = first_images(folder, split, count)
        words = ("--images", images, "--labels", labels, "--out", folder / name)
        subprocess.run(
            [sys.executable, "-m", "mepa_ds.data_tools.build_shards", "idx", *map(str, words)],
            check=True, capture_output=True, timeout=120, cwd=ROOT,
        )  # fmt: skip
    path = recipe(
        folder,
        "toy_tokenizer.yaml",
        output_dir=str(tokenizer),
        data={"images": str(folder / "train"), "heldout_images": str(folder / "heldout"), "num_workers": 0},
        train={"steps": 40, "global_batch": 16},
        log={"evaluate_every": 40, "checkpoint_every": 40},
    )
    mepa("train-tokenizer", path)
    for name in ("train", "heldout"):
        to_encode = ["tokens", str(folder / name), "--tokenizer", str(tokenizer)]
        subprocess.run(
            [sys.executable, "-m", "mepa_ds.data_tools.precompute", *to_encode],
            check=True, capture_output=True, timeout=120, cwd=ROOT,
        )  # fmt: skip
    base = recipe(
        folder,
        "toy_base.yaml",
        tokenizer=str(tokenizer),
        data__tokens=str(folder / "train.tokens-tokenizer"),
        data__heldout_tokens=str(folder / "heldout.tokens-tokenizer"),
        optim__warmup_steps=5,
        train__global_batch=16,
    )
    moe = {"num_experts": 4, "top_k": 3, "expert_ratio": 1.0}
    return recipe(
        folder,
        "toy.yaml",
        base=str(base),
        output_dir=str(folder / "study"),
        grids={
            "dense": {"sizes": ["d1w32", "d2w48", "d3w64"], "samples": [320, 640, 1280]},
            "moe": {"sizes": ["d2w48"], "moe": [moe], "samples": [640]},
        },
        seeds={"count": 2, "at": {"sizes": ["d2w48"], "samples": [640]}},
        hold_out={"sizes": ["d3w96"], "samples": [1280]},
        lr={"rule": "fixed", "peak": 2e-3},
    )


def test_from_a_study_file_to_the_table(study: Path) -> None:
    planned = json.loads(mepa("scale", "plan", study, "--no-memory", "--json"))
    assert len(planned["runs"]) == 12
    mepa("scale", "run", study, "--jobs", "2")
    mepa("scale", "collect", study)
    table = pd.read_parquet(study.parent / "study/table.parquet")
    assert list(table.columns[: len(COLUMNS)]) == list(COLUMNS)
    assert (table["status"] == "finished").all()
    assert (table["weights_step"] == table["steps"]).all()
    pd.testing.assert_frame_equal(
        pd.read_csv(study.parent / "study/table.csv"), table, check_dtype=False, check_exact=True
    )
    # Flops and sizes of the plan are those of the runs; longer runs of a size end lower.
    assert table.set_index("run")["flops_model"].to_dict() == {r["run"]: r["flops"] for r in planned["runs"]}
    dense = table[(table["kind"] == "dense") & (table["role"] == "fit") & (table["seed"] == 0)]
    for _, rows in dense.groupby("width"):
        assert rows.sort_values("samples")["loss"].is_monotonic_decreasing
    # The mean over tokens is the mean of the scales, weighted by their tokens.
    sides = [int(side) for side in table["scales"][0].split(",")]
    weights = [side * side / sum(s * s for s in sides) for side in sides]
    mean = sum(weight * table[f"loss_scale_{k}"] for k, weight in enumerate(weights, start=1))
    assert (table["loss"] - mean).abs().max() < 1e-5
    # All is done, so nothing runs again.
    before = {path: path.stat().st_mtime_ns for path in (study.parent / "study/runs").rglob("metrics.jsonl")}
    assert "all 12 runs are finished" in mepa("scale", "run", study)
    assert before == {path: path.stat().st_mtime_ns for path in before}
