"""The gradients' norm against DeepSpeed's own, in an engine's steps on several ranks; and what it is told not to do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.config import get_timers_config

from mepa_ds.config.base import apply_overrides, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.engine import deepspeed_config
from mepa_ds.engine.gradients import sum_of_squares
from mepa_ds.objective.objective import ModelInputs
from tests.engine.ranks import run_on_ranks
from tests.engine.test_expert_parallel import GLOBAL_BATCH, make_batch
from tests.tiny_run import FEATURE_WIDTH, recipe_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_of_long_and_short_gradients(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (1,), (0,), (300_000,), (2**17,), (1000, 1001)]
    gradients = [(3 * torch.randn(size, generator=generator) + 1).to(dtype) for size in sizes]
    expected = sum(gradient.double().square().sum() for gradient in gradients)
    torch.testing.assert_close(sum_of_squares(gradients).double(), expected, rtol=1e-6, atol=0)
    assert sum_of_squares([]) == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_shows(value: float) -> None:
    gradients = [torch.ones(10), torch.ones(200_000)]
    gradients[1][150_000] = value
    assert not sum_of_squares(gradients).isfinite()


def check_norms(folder: str) -> None:
    from mepa_ds.engine.engine import PretrainEngine

    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = GLOBAL_BATCH // world_size
    for settings in (["parallel.ep_size=2"], ["parallel.ep_size=1", "parallel.precision=bf16"]):
        values = apply_overrides(recipe_values(Path(folder)), [f"train.global_batch={GLOBAL_BATCH}", *settings])
        engine = PretrainEngine(validate(PretrainConfig, values, "test"), FEATURE_WIDTH, torch.device("cpu"))
        zero = engine.zero
        theirs: list[float] = []

        def theirs_too(zero=zero, ours=zero.get_grad_norm_direct, theirs=theirs):  # type: ignore[no-untyped-def]
            """DeepSpeed's norm of all groups, by its own method."""
            zero.get_grad_norm_direct = type(zero).get_grad_norm_direct.__get__(zero)
            theirs.append(float(type(zero).scaled_global_norm(zero)))
            zero.get_grad_norm_direct = ours
            return type(zero).scaled_global_norm(zero)

        zero.scaled_global_norm = theirs_too
        for step in range(4):
            rows = slice(rank * share, (rank + 1) * share)
            inputs = ModelInputs(**{name: tensor[rows] for name, tensor in make_batch(step).items()})
            if step == 2 and rank == 1:  # one rank's gradient is not finite: no rank steps
                assert inputs.features_BNP is not None
                inputs.features_BNP[0, 0, 0] = math.nan
            engine.begin_step()
            engine.backward(engine.forward(inputs))
            before = [partition.clone() for partition in zero.single_partition_of_fp32_groups]
            update = engine.update(lr=0.01)
            assert update.applied == (step != 2)
            unchanged = map(torch.equal, before, zero.single_partition_of_fp32_groups)
            assert all(unchanged) == (step == 2)
            if update.applied:
                assert update.grad_norm == pytest.approx(theirs[-1], rel=1e-6)
        assert theirs[0] > 0
        assert not math.isfinite(theirs[2])


def test_the_engines_norm_is_deepspeeds(tmp_path: Path) -> None:
    run_on_ranks(2, check_norms, str(tmp_path))


def test_deepspeed_does_not_time_micro_batches(tmp_path: Path) -> None:
    """Its timer waits for the GPU at the start and end of each."""
    config = validate(PretrainConfig, recipe_values(tmp_path), "test")
    assert not get_timers_config(deepspeed_config.build(config, 1)).enabled
