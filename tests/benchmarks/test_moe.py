"""The MoE benchmark runs, at a size of no interest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import ROOT


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "moe.py"), "--tokens", "64", "--repeats", "1", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_all_layers_are_compared_on_the_same_tokens(tmp_path: Path) -> None:
    report = tmp_path / "moe.json"
    shapes = ["--shapes", "16x32x4", "16x32x8"]
    result = benchmark(*shapes, "--imbalances", "1", "4", "--dtypes", "fp32", "--json", str(report))
    assert result.returncode == 0, result.stderr
    cases = json.loads(report.read_text())["cases"]
    assert len(cases) == 4
    for case in cases:
        assert set(case["results"]) == {"ours", "ours grouped", "ours ep2", "mask loop", "deepspeed", "dense"}
        for name, found in case["results"].items():
            assert found["ms"] > 0, name
            assert found["peak_mib"] > 0, name
    # The fullest of 4 experts has at most E / K = 2 times the mean.
    assert [case["imbalance"] <= 2 for case in cases] == [True, True, True, False]
    assert "16x32, fp32, imbalance 4: E = 8 takes" in result.stdout


@pytest.mark.slow
def test_a_table_without_ours_and_a_rank_that_dies(tmp_path: Path) -> None:
    result = benchmark("--shapes", "16x32x4", "--contenders", "dense", "--no-ep", "--dtypes", "fp32")
    assert result.returncode == 0, result.stderr
    assert "dense" in result.stdout
    # Three experts do not go on two ranks.
    result = benchmark("--shapes", "16x32x3", "--contenders", "dense", "--dtypes", "fp32")
    assert result.returncode == 1
    assert "ours ep2: a rank died, its error stands above; --no-ep leaves it out" in result.stderr
