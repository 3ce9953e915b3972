"""`mepa quickstart` from the first stage to the report, with a few steps of training, and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mepa_ds.config.base import apply_overrides, read_yaml
from tests.tiny_run import ROOT

SHORT = {
    "quickstart.yaml": ["train.steps=4", "log.every=2", "log.evaluate_every=2", "log.checkpoint_every=2"],
    "tokenizer_quickstart.yaml": ["train.steps=4", "log.every=2", "log.evaluate_every=2", "log.checkpoint_every=2"],
}
KEYS = {
    "stage_seconds",
    "samples_per_second",
    "train_ce",
    "train_ce_last_scale",
    "heldout_ce",
    "heldout_ce_last_scale",
    "world_size",
    "ep_size",
    "zero_stage",
    "total_parameters",
    "active_parameters",
    "expert_load_per_scale",
    "class_agreement",
    "svc_heldout_accuracy",
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone of the repository, with recipes cut short."""
    for name in ("pretrain.py", "data_tools", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "recipes").mkdir()
    for name, overrides in SHORT.items():
        values = apply_overrides(read_yaml(ROOT / "recipes" / name), overrides)
        (tmp_path / "recipes" / name).write_text(yaml.safe_dump(values))
    return tmp_path


def quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mepa_ds", "quickstart"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.timeout(600)
def test_quickstart_runs_reports_and_resumes(clone: Path) -> None:
    first = quickstart(clone)
    assert first.returncode == 0, first.stdout + first.stderr
    report = json.loads((clone / "runs/quickstart/report.json").read_text())
    assert report.keys() >= KEYS
    assert (report["world_size"], report["ep_size"], report["zero_stage"]) == (2, 2, 2)
    assert [len(row) for row in report["expert_load_per_scale"]] == [8] * 4
    assert 0 <= report["class_agreement"] <= 1
    assert report["svc_heldout_accuracy"] > 0.95
    assert set(report["stage_seconds"]) == {
        *("shards", "tokenizer", "precompute", "pretraining", "samples", "report", "total")
    }
    assert (clone / "runs/quickstart/samples.png").stat().st_size > 1000

    (clone / "runs/quickstart/samples.png").unlink()
    second = quickstart(clone)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("finished before, skipped") == 4
    assert (clone / "runs/quickstart/samples.png").exists()


def test_outside_a_clone_it_says_so(tmp_path: Path) -> None:
    result = quickstart(tmp_path)
    assert result.returncode == 2
    assert "run the quickstart in a clone of the repository" in result.stderr
