"""Work counted by running the model, layouts compared, and the command."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mepa_ds.cli.scale import main
from mepa_ds.cli.scale.cluster import cluster_of, numbers_of
from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.objective import flops
from mepa_ds.planning.cluster.machines import DEVICES, Assumptions
from mepa_ds.planning.cluster.search import ep_sizes, layouts, search
from mepa_ds.planning.cluster.work import Workload
from mepa_ds.planning.plan import Machine, plan_run
from mepa_ds.slurm.profile import read_profile
from tests.planning.cluster.test_step import CLUSTER
from tests.tiny_run import ROOT, make_run, write_recipe

# Matrices are large beside a small model's embeddings and scalars, so that counts compare.
SIZES = (
    "parallel.precision=bf16", "model.width=128", "model.scales=[1,2,3,4,6]", "model.codebook_size=256",
    "train.global_batch=48",
)  # fmt: skip


def workload_of(
    folder: Path, *overrides: str, sizes: Sequence[int] = (1, 2, 4), images: tuple[int, int] = (2, 24)
) -> Workload:
    config = load_config(PretrainConfig, write_recipe(folder, *SIZES, *overrides))
    return Workload(config, sizes, images)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return workload_of(tmp_path_factory.mktemp("workload"))


@pytest.mark.parametrize("ep_size", [1, 4])
def test_counted_products_are_those_of_the_formula(workload: Workload, ep_size: int) -> None:
    """And those that the formula leaves out, of routing, alignment and attention computed again: few even here."""
    _, operators = workload.micro_batch(ep_size, 16)
    config = workload.with_layout(ep_size, 1, 16)
    assert 0.98 < operators.matrix_flops / flops.step_flops(config, 768) < 1.1


@pytest.mark.parametrize(("ep_size", "images"), [(2, 10), (4, 40)])
def test_micro_batches_between_those_that_ran_need_what_they_would(
    workload: Workload, ep_size: int, images: int
) -> None:
    """Memory of the plan, to 3 %; experts that a rank holds, exactly."""
    machine = Machine(4, is_gpu=True, memory=None, process=0)
    config = workload.with_layout(ep_size, 1, 4 * images)
    exact = plan_run(config, machine)
    near = plan_run(config, machine, measured=workload.micro_batch(ep_size, images)[0])
    assert near.held == exact.held
    assert near.peak == pytest.approx(exact.peak, rel=0.03)
    assert sum(near.backward.values()) == pytest.approx(sum(exact.backward.values()), rel=0.03)


def test_exchanged_bytes_are_the_plans(workload: Workload) -> None:
    config = workload.with_layout(4, 1, 4 * 12)
    plan = plan_run(config, Machine(4, is_gpu=True, memory=None, process=0))
    (sent,) = (size for name, size in plan.exchanged.items() if "all-to-all" in name)
    work = workload.of_rank(4, 12, 4)
    assert (work.forward_exchanges + work.backward_exchanges) * work.exchanged_bytes * 3 / 4 == pytest.approx(sent)
    assert work.expert_bytes == 2 * plan.held["routed experts"]
    assert workload.of_rank(1, 12, 4).forward_exchanges == 0


def test_recomputed_blocks_exchange_again(tmp_path: Path) -> None:
    again = "parallel.activation_checkpointing=blocks"
    work = workload_of(tmp_path, again, sizes=[4], images=(4, 4)).of_rank(4, 4, 4)
    assert work.forward_exchanges == 2 * work.backward_exchanges


def test_layouts_are_all_ways_to_spread_a_batch() -> None:
    found = layouts(8, 48, [1, 2, 4, 8])
    assert {(layout.micro_batch, layout.accumulation) for layout in found} == {(6, 1), (3, 2), (2, 3), (1, 6)}
    assert len(found) == 4 * 4 * 2
    assert all(layout.global_batch == 48 for layout in found)
    assert layouts(9, 48, [1]) == []
    assert ep_sizes(8, [12, 6]) == [1, 2, 4]


def test_the_fastest_layout_that_fits(workload: Workload) -> None:
    found = search(workload, [4, 5, 16], 48, CLUSTER, Assumptions())
    assert [entry.world_size for entry in found] == [4, 5, 16]
    for entry in (found[0], found[2]):
        seconds = [simulated.step_seconds for simulated in entry.layouts]
        assert seconds == sorted(seconds)
        assert entry.best is not None
        assert 0 < entry.best.mfu < 1
        assert entry.best.images_per_second == pytest.approx(48 / seconds[0])
    assert found[1].reason == "the global batch of 48 does not divide by 5; --global-batch 50 does"
    best = found[0].best
    assert best is not None
    tight = replace(CLUSTER, device_memory=best.memory * 0.999, ranks_per_node=8)
    (again,) = search(workload, [4], 48, tight, Assumptions(usable_memory=1))
    assert again.best is None or again.best.memory < best.memory
    (none,) = search(workload, [4], 48, replace(CLUSTER, device_memory=1e6), Assumptions())
    assert none.best is None
    assert none.reason is not None
    assert re.fullmatch(
        r"does not fit: \d+\.\d GB at least, 0\.0 GB are usable; try parallel\.activation_checkpointing=blocks",
        none.reason,
    )


def test_online_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the simulation knows precomputed sets"):
        workload_of(tmp_path, "data.tokens=null", "data.features=null", "data.images=x", "objective.alignment=null")


def test_numbers_of_gpus() -> None:
    assert numbers_of("8..100") == [8, 16, 32, 64]
    assert numbers_of("8..8") == [8]
    assert numbers_of("8,24,96") == [8, 24, 96]
    for text in ("", "8..", "8,x", "16..8", "0"):
        with pytest.raises(UserError, match="expected a range such as"):
            numbers_of(text)


def test_the_shipped_profile_and_its_mistakes(tmp_path: Path) -> None:
    cluster = cluster_of(read_profile(str(ROOT / "slurm/clusters/h100.env")))
    assert (cluster.node_bandwidth, cluster.network_bandwidth) == (450e9, 50e9)
    assert (cluster.ranks_per_node, cluster.device_memory, cluster.peak_flops) == (8, 80e9, 989e12)
    own = tmp_path / "own.env"
    own.write_text("MEPA_PARTITION=gpu\nMEPA_GPU_TYPE=a100-sxm4-80gb\n")
    assert cluster_of(read_profile(str(own))).network_bandwidth == DEVICES["a100"].network_bandwidth
    own.write_text("MEPA_PARTITION=gpu\nMEPA_GPU_TYPE=mi300x\n")
    with pytest.raises(UserError, match="the simulation knows a100, h100, h200, b200; copy the profile"):
        cluster_of(read_profile(str(own)))
    own.write_text("MEPA_PARTITION=gpu\nMEPA_GPU_TYPE=h100\nMEPA_NETWORK_BANDWIDTH_GBS=400Gb\n")
    with pytest.raises(UserError, match="NETWORK_BANDWIDTH_GBS=400Gb: expected GB a second"):
        cluster_of(read_profile(str(own)))


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    with pytest.raises(UserError, match=r"precision: fp32 is not simulated, only bf16 and fp16"):
        main(["cluster", recipe])
    with pytest.raises(UserError, match="--global-batch 0: expected at least 1"):
        main(["cluster", recipe, "parallel.precision=bf16", "--global-batch", "0"])
    for name, value, expected in (
        ("matrix-share", "0", "above 0, at most 1"),
        ("hidden-share", "1.5", "at least 0, at most 1"),
        ("imbalance", "0.5", "at least 1"),
    ):
        with pytest.raises(UserError, match=rf"--assume\.{name} {value}: expected a number {expected}$"):
            main(["cluster", recipe, f"--assume.{name}", value])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--json: .*cannot write there"):
        main(["cluster", recipe, "parallel.precision=bf16", "--json", str(tmp_path / "file/out.json")])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "parallel.precision=bf16", "train.global_batch=48", "model.moe=null")
    words = ["cluster", str(tmp_path / "recipe.yaml"), "--gpus", "4,8,32", "--profile"]
    words += [str(ROOT / "slurm/clusters/h100.env"), "--assume.latency-us", "20"]
    main([*words, "--json", str(tmp_path / "out.json"), "--figure", str(tmp_path / "out.png")])
    text = capsys.readouterr().out
    assert "simulated: 48 images a step" in text
    assert "32 GPUs: the global batch of 48 does not divide by 32; --global-batch 64 does" in text
    assert "latency_us 20" in text
    assert re.search(r"\n8 +loader, first epoch +\d+ +\d+", text)
    facts = json.loads((tmp_path / "out.json").read_text())
    assert [entry["gpus"] for entry in facts["gpus"]] == [4, 8, 32]
    best = facts["gpus"][1]["best"]
    assert sum(best["seconds"].values()) == pytest.approx(best["step_seconds"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
