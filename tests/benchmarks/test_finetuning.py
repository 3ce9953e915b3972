"""`benchmarks/finetuning.py` counts rightly, and makes nothing twice."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.importing import load_benchmark

SCRATCH = [(5, 4.0), (10, 3.0), (15, 2.5), (20, 2.6)]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load_benchmark("finetuning", monkeypatch)


def compared(benchmark: Any, half: Sequence[tuple[int, float]], whole: Sequence[tuple[int, float]]) -> Any:
    return benchmark.compared({"scratch": SCRATCH, "half": half, "frozen": half, "whole": whole})


def test_the_target_is_the_lowest_of_scratch_and_the_first_step_at_it_counts(benchmark: Any) -> None:
    whole = [(5, 3.0), (10, 2.5), (15, 2.6), (20, 2.4)]
    found = compared(benchmark, [(5, 2.7), (10, 2.6)], whole)
    assert found["scratch"] == 2.5
    assert found["half_minus_scratch"] == pytest.approx(0.1)
    assert (found["first_step"], found["share_of_steps"]) == (10, 0.5)
    never = compared(benchmark, [(10, 2.4)], [(5, 2.9), (20, 2.51)])
    assert (never["first_step"], never["share_of_steps"]) == (None, None)
    assert never["half_minus_scratch"] == pytest.approx(-0.1)


def test_means_are_of_all_seeds_or_there_is_none(benchmark: Any) -> None:
    good = compared(benchmark, [(10, 2.3)], [(5, 2.4), (20, 2.2)])
    bad = compared(benchmark, [(10, 2.8)], [(5, 3.0), (20, 2.7)])
    both = benchmark.summary([good, bad])
    assert (both["seeds"], both["half_is_enough"], both["share_of_steps"]) == (2, 1, None)
    assert both["half_minus_scratch"] == pytest.approx(0.05)
    assert benchmark.summary([good, good])["share_of_steps"] == 0.25


def test_each_arm_has_its_best_rate_of_the_first_seed_and_no_run_is_trained_twice(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    class Workshop:
        options = benchmark.Options(seeds=(3, 4), rates=(0.1, 0.2, 0.4))

        def train_all(self, runs: Sequence[Any]) -> dict[Any, list[tuple[int, float]]]:
            asked.extend(runs)
            best = {"scratch": 0.4, "half": 0.2, "frozen": 0.2, "whole": 0.2}
            return {run: [(run.steps, 1.0 + abs(run.rate - best[run.arm]) + run.seed / 100)] for run in runs}

    found = benchmark.compare(Workshop(), "all", 40)
    assert found["rates"] == {"scratch": 0.4, "half": 0.2, "frozen": 0.2, "whole": 0.2}
    assert found["by_rate"]["half"] == {"0.1": pytest.approx(1.13), "0.2": 1.03, "0.4": pytest.approx(1.23)}
    assert {run.steps for run in asked if run.arm in ("half", "frozen")} == {20}
    assert {run.steps for run in asked if run.arm in ("scratch", "whole")} == {40}
    assert len(asked) == len(set(asked)) == 3 + 3 + 2 * 4 - 2
    assert [row["half_minus_scratch"] for row in found["rows"]] == [0, 0]
    benchmark.show("all", found)
    assert "100 % of the steps" in capsys.readouterr().out


def test_what_has_ended_is_not_trained_again(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = benchmark.Workshop(benchmark.Options(out=tmp_path))
    (tmp_path / "runs/x").mkdir(parents=True)
    records = [{"event": "heldout", "step": step, "ce": ce} for step, ce in SCRATCH]
    (tmp_path / "runs/x/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    called: list[object] = []
    monkeypatch.setattr(workshop, "command", lambda *words: called.append(words))
    assert workshop.train("x", "fashion", 20) == SCRATCH
    assert workshop.make(tmp_path / "runs", "data") == tmp_path / "runs"
    assert called == []
    workshop.train("x", "fashion", 40)
    assert len(called) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_images_to_numbers(benchmark: Any, tmp_path: Path) -> None:
    """On made-up images in Fashion-MNIST's format, with runs of a few steps."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 3000), ("t10k", 1000)):
        images = struct.pack(">HBB3I", 0, 8, 3, count, 28, 28) + rng.bytes(count * 28 * 28)
        labels = struct.pack(">HBBI", 0, 8, 1, count) + bytes(index % 10 for index in range(count))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, 1))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, 1))
    options = benchmark.Options(
        out=tmp_path / "out", json=tmp_path / "found.json", fashion=tmp_path, seeds=(0,), rates=(8e-3,), steps=4,
        few=20, few_steps=4, digit_steps=4, tokenizer_steps=2, train_images=3000,
    )  # fmt: skip
    benchmark.main(options)
    found = json.loads((tmp_path / "found.json").read_text())
    for kind in ("all", "few"):
        assert found[kind]["mean"]["seeds"] == 1
        assert found[kind]["rows"][0]["scratch"] > 0
