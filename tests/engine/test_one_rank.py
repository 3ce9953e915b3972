"""Gradients that go straight into the flat one, against DeepSpeed's own way through buckets: the same to the bit."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mepa_ds.checkpoint.fragment import EXP_AVG, MASTER
from mepa_ds.config.base import apply_overrides, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.engine.gradients import gathers_directly
from mepa_ds.objective.objective import ModelInputs
from tests.engine.ranks import run_on_ranks, take_step
from tests.engine.test_expert_parallel import GLOBAL_BATCH, make_batch
from tests.tiny_run import FEATURE_WIDTH, recipe_values


def train(folder: str, settings: list[str]) -> tuple[list[float], list[Tensor], bool]:
    """Norms, masters and moments of four steps; and whether gradients went straight there."""
    from mepa_ds.engine.engine import PretrainEngine

    values = apply_overrides(recipe_values(Path(folder)), [f"train.global_batch={GLOBAL_BATCH}", *settings])
    config = validate(PretrainConfig, values, "test")
    engine = PretrainEngine(config, FEATURE_WIDTH, torch.device("cpu"))
    share = GLOBAL_BATCH // config.train.accumulation
    norms = []
    for step in range(4):
        batch, starts = make_batch(step), range(0, GLOBAL_BATCH, share)
        micro_batches = [ModelInputs(**{k: v[at : at + share] for k, v in batch.items()}) for at in starts]
        norms.append(take_step(engine, micro_batches, 1e-2).grad_norm)
    flats = engine.flats((MASTER, EXP_AVG))
    return (
        norms,
        [tensor.clone() for kind in flats.values() for tensor in kind],
        "process_gradients" in vars(engine.zero),
    )


def compare(folder: str) -> None:
    for settings in (
        ["parallel.precision=fp32"],
        ["parallel.precision=bf16", "train.accumulation=2", "optim.clip=0.1"],
    ):
        norms, tensors, directly = train(folder, settings)
        with patch("mepa_ds.engine.engine.gathers_directly", lambda *_: False):
            their_norms, their_tensors, directly_too = train(folder, settings)
        assert norms == their_norms
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, their_tensors, strict=True))
        assert (directly, directly_too) == (True, False)


def test_the_same_steps_to_the_bit(tmp_path: Path) -> None:
    run_on_ranks(1, compare, str(tmp_path))


@pytest.mark.parametrize(
    ("world_size", "knobs", "expected"),
    [
        (1, {"zero_optimization": {"stage": 2}}, True),
        (1, {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}}, False),
        (1, {"zero_optimization": {"stage": 1}}, False),
        (2, {"zero_optimization": {"stage": 2}}, False),
    ],
)
def test_where_deepspeeds_own_way_stays(world_size: int, knobs: dict[str, object], expected: bool) -> None:
    assert gathers_directly(knobs, world_size) is expected
