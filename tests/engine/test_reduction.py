"""The reduction of gradients: the knobs for it change no number, and it sends what a plan says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mepa_ds import distributed
from mepa_ds.config.base import apply_overrides, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.engine import deepspeed_config
from mepa_ds.objective.objective import ModelInputs
from mepa_ds.planning.plan import Machine, Plan, plan_run
from tests.engine.ranks import run_on_ranks, take_step
from tests.engine.test_expert_parallel import GLOBAL_BATCH, make_batch
from tests.tiny_run import ROOT, recipe_values

STEPS, LEAST = 3, 1000
ZERO2 = json.loads((ROOT / "ds_configs/zero2.json").read_text())
KNOBS: dict[str, dict[str, Any]] = {
    "default": {},
    "overlapping": {"overlap_comm": True, "reduce_bucket_size": 20_000},
    "to each owner": {"overlap_comm": True, "use_multi_rank_bucket_allreduce": False},
}


def configuration(folder: Path, knobs: dict[str, Any]) -> PretrainConfig:
    path = folder / f"{abs(hash(str(knobs)))}.json"
    path.write_text(json.dumps({"zero_optimization": ZERO2["zero_optimization"] | knobs}))
    settings = [f"parallel.deepspeed={path}", f"train.global_batch={GLOBAL_BATCH}", "parallel.ep_size=2"]
    settings += ["objective.alignment=null", "data.features=null"]  # a plan would guess the teacher's width
    return validate(PretrainConfig, apply_overrides(recipe_values(folder), settings), "test")


def check_reductions(folder: str) -> None:
    from deepspeed import comm

    from mepa_ds.engine.engine import PretrainEngine

    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = GLOBAL_BATCH // world_size
    taken, masters = {}, {}
    for name, knobs in KNOBS.items():
        config = configuration(Path(folder) / str(rank), knobs)
        engine = PretrainEngine(config, None, torch.device("cpu"))
        zero = engine.zero
        assert zero.overlap_comm == knobs.get("overlap_comm", False)
        sent: list[float] = []
        original = comm.all_reduce

        def counting(tensor: torch.Tensor, *rest: Any, sent: Any = sent, call: Any = original, **named: Any) -> Any:
            n = dist.get_world_size(named.get("group"))
            if tensor.nbytes > LEAST:  # the others are norms
                sent.append(2 * (n - 1) / n * tensor.nbytes)  # a ring's all-reduce over n ranks
            return call(tensor, *rest, **named)

        comm.all_reduce = counting
        steps = []
        for step in range(STEPS):
            rows = slice(rank * share, (rank + 1) * share)
            inputs = ModelInputs(
                **{key: tensor[rows] for key, tensor in make_batch(step).items() if key != "features_BNP"}
            )
            steps.append(take_step(engine, [inputs], lr=0.01))
        comm.all_reduce = original
        taken[name] = torch.tensor([[float(one.losses[0].total), one.grad_norm] for one in steps])
        masters[name] = [partition.clone() for partition in zero.single_partition_of_fp32_groups]
        if name != "to each owner":
            planned = planned_for(config).exchanged["gradients, reduced"]
            assert sum(sent) / STEPS == pytest.approx(planned, rel=0.02), name
    for name in KNOBS:
        torch.testing.assert_close(taken[name], taken["default"], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(masters[name], masters["default"], atol=1e-6, rtol=1e-5)


def planned_for(config: PretrainConfig, world_size: int = 2) -> Plan:
    return plan_run(config, Machine(world_size, is_gpu=False, memory=None, process=0), num_samples=100)


def test_knobs_change_no_number_and_the_plan_knows_what_is_sent(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    run_on_ranks(2, check_reductions, str(tmp_path))


def test_a_plan_knows_the_knobs(tmp_path: Path) -> None:
    sent = {name: planned_for(configuration(tmp_path, knobs)).exchanged for name, knobs in KNOBS.items()}
    assert sent["default"]["gradients, reduced"] == 2 * sent["to each owner"]["gradients, reduced"]
    assert sent["default"]["weights, gathered"] == sent["to each owner"]["gradients, reduced"]
    config = configuration(tmp_path, {"reduce_bucket_size": 1_000_000})
    gradients = [
        plan_run(config, Machine(ranks, is_gpu=True, memory=None, process=0), num_samples=100).backward["gradients"]
        for ranks in (2, 4)
    ]
    assert gradients == [4e6, 4e6]
    both = plan_run(
        configuration(tmp_path, {"reduce_bucket_size": 1_000_000, "overlap_comm": True}),
        Machine(2, is_gpu=True, memory=None, process=0),
        num_samples=100,
    )
    assert both.backward["gradients"] == 8e6


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_file_of_knobs_comes_first(tmp_path: Path, overlaps: bool) -> None:
    for said, expected in (({}, overlaps), ({"overlap_comm": False}, False), ({"overlap_comm": True}, True)):
        built = deepspeed_config.build(configuration(tmp_path, said), 2, overlaps)
        assert built["zero_optimization"]["overlap_comm"] is expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, False),
        ({"RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, True),
        ({"RANK": "1", "WORLD_SIZE": "16", "LOCAL_SIZE": "8"}, True),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1"}, False),
    ],
)
def test_ranks_on_several_nodes(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"MASTER_ADDR": "n1", "SLURM_LOCALID": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    assert distributed.spans_nodes() == expected
