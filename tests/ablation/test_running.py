"""An ablation at work, here and on a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from mepa_ds.ablation.plan import read_ablation
from tests.ablation.studies import MOE, ablation_file
from tests.tiny_run import ROOT, make_run


@pytest.mark.slow
@pytest.mark.processes
def test_one_command_trains_and_compares(tmp_path: Path) -> None:
    make_run(tmp_path)
    arms = {"dense": {"title": "dense"}, "stmoe": {"title": "STMoE", "set": {"model.moe": MOE}}}
    file = ablation_file(tmp_path, arms=arms, compare=[], seeds=2, base={"train": {"global_batch": 8, "steps": 3}})
    command = [sys.executable, "-m", "mepa_ds", "ablate", str(file), "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    end = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
    )
    assert end.returncode == 0, end.stdout + end.stderr
    report = read_ablation(file).output_dir / "report"
    table = pd.read_csv(report / "table.csv")
    assert list(table["state"]) == ["finished"] * 4
    assert table["ce"].nunique() == 4
    assert "4 of 4 runs are finished" in (report / "ablation.md").read_text()
