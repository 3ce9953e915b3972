"""The public way computes our losses; switched-off gains change nothing but the time; and the benchmark's table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.public_way import PublicWay
from benchmarks.step_contenders import WITHOUT, recipe
from benchmarks.train_step import Times, measure
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.objective import ModelInputs, PretrainingObjective
from tests.tiny_run import ROOT

WIDTH = 24


def make(seed: int = 0) -> tuple[PretrainingObjective, ModelInputs]:
    """The benchmark's nano model and a batch."""
    config = recipe("nano", 2, "fp32")
    objective = PretrainingObjective(NextScaleTransformer(config.model), config.objective, WIDTH)
    objective.init_weights(0)
    with torch.no_grad():  # gates as of a trained model, so that every block counts
        for name, parameter in objective.named_parameters():
            if "adaln" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    generator = torch.Generator().manual_seed(seed)
    schedule = config.model.schedule
    return objective, ModelInputs(
        labels_B=torch.tensor([1, 10]),
        inputs_BLZ=torch.randn(2, schedule.num_tokens - 1, config.model.code_width, generator=generator),
        tokens_BL=torch.randint(config.model.codebook_size, (2, schedule.num_tokens), generator=generator),
        features_BNP=torch.randn(2, 256, WIDTH, generator=generator),
        branch_scale_D2B=torch.tensor([[[1.0, 1.0], [0.0, 2.0]], [[1.0, 0.0], [1.0, 1.0]]]),
    )


def test_the_public_way_has_our_loss_and_gradients() -> None:
    """1e-5 of the largest value, in all weights that both hold alike."""
    ours, inputs = make()
    theirs, _ = make()
    public = PublicWay(theirs)
    ours_total, theirs_total = ours(inputs).total, public(inputs)
    assert theirs_total.item() == pytest.approx(ours_total.item(), rel=1e-6)
    ours_total.backward()
    theirs_total.backward()
    found = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        if ".experts." in name:
            prefix, part = name.split(".experts.")
            layer, kind = part.split("_")
            separate = [found[f"{prefix}.experts.{number}.{layer}.{kind}"].grad for number in range(4)]
            given = [torch.zeros_like(parameter[0]) if grad is None else grad for grad in separate]
        else:
            given = [found[name].grad]  # type: ignore[list-item]
        tolerance = 1e-5 * max(parameter.grad.abs().max().item(), 1e-4)
        gradient = torch.stack(given).view_as(parameter)
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=tolerance, msg=f"{name}: {{}}".format)
        compared += 1
    assert compared == len(list(ours.parameters()))


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_a_gain_that_is_switched_off_changes_no_number(name: str) -> None:
    objective, inputs = make()
    expected = objective(inputs).total
    with WITHOUT[name](objective):
        found = objective(inputs).total
        found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_a_ratio_is_taken_round_by_round() -> None:
    assert Times([2.0, 30.0, 3.0], [1.0, 10.0, 3.0]).ratio == 2.0  # 2, 3, 1: the slow round does not count more


def test_each_contender_is_compared_with_ours_around_it() -> None:
    order: list[str] = []
    steps = {name: partial(order.append, name) for name in ("ours", "a", "b")}
    times = measure(steps, rounds=2, device="cpu")
    assert order == ["ours"] * 2 + ["a", "a", "ours", "ours", "b", "b", "ours", "ours"] * 3
    assert [len(times[name].own) for name in ("ours", "a", "b")] == [4, 2, 2]
    assert times["ours"].ratio == 1


@pytest.mark.slow
def test_the_table(tmp_path: Path) -> None:
    report, chart = tmp_path / "step.json", tmp_path / "step.png"
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--model", "nano", "--batch", "1"]
    command += ["--rounds", "1", "--threads", "1", "--json", str(report), "--chart", str(chart)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert "whole step: ours is" in result.stdout
    for case in json.loads(report.read_text())["cases"]:
        assert case["results"]["ours"]["times_as_long_as_ours"] == 1
        assert all(found["seconds"] > 0 for found in case["results"].values())
    assert chart.read_bytes().startswith(b"\x89PNG")
