"""What a run leaves behind besides weights: numbers in metrics.jsonl, TensorBoard and wandb, pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mepa_ds import distributed
from mepa_ds.generation.sampling import NonFiniteLogitsError
from mepa_ds.runtime.metrics import read_metrics
from tests.ranks import Ranks, finish
from tests.tiny_run import losses, make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    constant = ["optim.schedule=constant", "optim.warmup=0"]  # so that a longer run begins as a shorter one
    make_run(folder, "train.steps=null", "train.samples=78", "log.evaluate_every=5", *constant)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """10 steps on 2 ranks at ep_size 2, stopped after 5 and resumed, with everything that can be recorded."""
    settings = ["parallel.ep_size=2", "log.sample_every=5", "log.tensorboard=true", "log.wandb_project=test"]
    arguments = [str(folder / "recipe.yaml"), f"output_dir={folder / 'run'}", *settings]
    for samples in (40, 78):
        finish([*arguments, f"train.samples={samples}"], 2, folder / "run.log")
    return folder / "run"


def test_a_length_in_samples_is_rounded_up_to_steps(run: Path) -> None:
    assert len(losses(run)) == 10


def test_dependencies_say_nothing(run: Path) -> None:
    """DeepSpeed calls what PyTorch retires, and Weights & Biases is chatty."""
    log = run.with_suffix(".log").read_text()
    assert "done: 10 steps" in log
    assert [line for line in log.splitlines() if "Warning" in line or "wandb" in line] == []


def test_every_part_of_a_step_is_timed_on_every_rank(run: Path) -> None:
    train = [record for record in read_metrics(run / "metrics.jsonl") if record["event"] == "train"]
    for record in train:
        parts = [record[f"{part}_seconds"] for part in ("data", "inputs", "forward", "backward", "optimizer")]
        assert all(seconds > 0 for seconds in parts)
        assert 0.5 * record["step_seconds"] < sum(parts) <= record["step_seconds"]
        for part, spread in record["ranks"].items():
            assert 0 < spread["min"] <= spread["max"], part
            assert spread["max_rank"] in (0, 1)
        assert record["flops_per_second"] > 0
        assert "mfu" not in record, "a CPU has no peak to compare with"


def test_sample_grids_are_pictures_that_change(run: Path, folder: Path) -> None:
    grids = sorted((run / "samples").iterdir())
    assert [path.name for path in grids] == ["step_00000005.png", "step_00000010.png"]
    first, second = (np.asarray(Image.open(path)) for path in grids)
    assert first.shape == second.shape
    assert first.std() > 0
    assert (first != second).any()
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["event"] == "samples"]
    assert [record["path"] for record in records] == ["samples/step_00000005.png", "samples/step_00000010.png"]


def sample_nothing_finite_on_rank_1() -> None:
    """Runs in each rank's process before the run."""
    from mepa_ds.generation import sample_grids

    original = sample_grids.sample

    def sample(*arguments: Any, **settings: Any) -> torch.Tensor:
        images_B3HW = original(*arguments, **settings)
        if distributed.rank() == 1:
            raise NonFiniteLogitsError("sampling: the model's logits are NaN")
        return images_B3HW

    sample_grids.sample = sample


def test_weights_that_give_no_picture_do_not_end_a_run(folder: Path) -> None:
    output, log = folder / "no_picture", folder / "no_picture.log"
    settings = ["parallel.ep_size=2", "log.sample_every=5", "guards.stop_before_end=5"]
    arguments = [str(folder / "recipe.yaml"), f"output_dir={output}", *settings]
    with Ranks(arguments, 2, log, sample_nothing_finite_on_rank_1) as ranks:
        assert ranks.wait() == [0, 0], log.read_text()
    records = list(read_metrics(output / "metrics.jsonl"))
    warnings = [record for record in records if record["event"] == "samples_failed"]
    assert [record["step"] for record in warnings] == [5, 10]
    assert warnings[0]["message"] == "no picture: rank 1: sampling: the model's logits are NaN"
    (warning,) = [record for record in records if record["event"] == "no_job_end"]
    assert "guards.stop_before_end: SLURM_JOB_END_TIME is not set" in warning["message"]


def test_sampling_and_evaluation_do_not_touch_training(run: Path, folder: Path) -> None:
    settings = ["parallel.ep_size=2", "log.evaluate_every=1000"]
    arguments = [str(folder / "recipe.yaml"), f"output_dir={folder / 'plain'}", *settings]
    finish(arguments, 2, folder / "plain.log")
    assert losses(folder / "plain") == losses(run)


def test_tensorboard_has_every_step_once(run: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    scalars = accumulator.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == list(range(1, 11))
    np.testing.assert_allclose([scalar.value for scalar in scalars], losses(run), rtol=1e-6)


def test_wandb_is_one_offline_run(run: Path) -> None:
    identifier = (run / "wandb_id").read_text()
    starts = list((run / "wandb").glob(f"offline-run-*-{identifier}"))
    assert len(starts) == 2
    assert all((start / f"run-{identifier}.wandb").stat().st_size > 1000 for start in starts)


def test_every_line_of_the_output_is_ours(run: Path) -> None:
    """Two ranks under a launcher, with all trackers, stopped and resumed, stderr in the same file."""
    log = run.with_suffix(".log").read_text()
    ours = re.compile(
        r"model: .* parameters|legend  |step \d+/(?:5|10)  epoch .* left$|step \d+  (held-out ce|picture: |warning: )|"
        r"resumed from |the recipe has changed |done: \d+ steps"
    )
    assert [line for line in log.splitlines() if not ours.match(line)] == []
    assert not set("\r\x1b") & set(log), "nothing that moves a cursor"
    assert log.count("legend  loss: ") == 2, "once a start"


def test_trackers_get_pictures_too(run: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    tags = accumulator.Tags()
    assert {"samples", "experts/by_scale", "experts/by_layer"} <= set(tags["images"])
    assert {"train/guidance_cosine", "train/max_expert_share", "heldout/ce"} <= set(tags["scalars"])
    assert not any(tag.startswith("written/") or "/ranks/" in tag for tag in tags["scalars"]), "all only on request"


def test_records_have_what_is_worth_watching(run: Path) -> None:
    records = list(read_metrics(run / "metrics.jsonl"))
    start = next(record for record in records if record["event"] == "start")
    assert {"mepa_ds", "torch", "deepspeed", "python"} <= start["versions"].keys()
    routing = {record["step"]: record for record in records if record["event"] == "routing"}
    for record in (record for record in records if record["event"] == "train"):
        assert record["guidance_cosine"] == pytest.approx(-record["alignment"] / 2), "of two scales"
        largest = max(max(layer["load"]) for layer in routing[record["step"]]["layers"].values())
        assert record["max_expert_share"] == pytest.approx(largest, abs=1e-5)
