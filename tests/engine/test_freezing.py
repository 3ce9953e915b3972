"""What is frozen keeps its weights to the bit, and the rest is trained as ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mepa_ds.config.base import apply_overrides, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.models.adapting.freezing import frozen_names
from mepa_ds.objective.objective import ModelInputs
from tests.engine.ranks import run_on_ranks, take_step
from tests.engine.test_expert_parallel import GLOBAL_BATCH, make_batch
from tests.tiny_run import FEATURE_WIDTH, recipe_values

NAMES = ["transformer.blocks.0.attention.qkv.weight", "transformer.blocks.1.ffn.fc1.weight", "projector.0.weight"]


def trained(folder: str, settings: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Weights before and after three steps, and the last norm of the gradient."""
    from mepa_ds.engine.engine import PretrainEngine

    values = apply_overrides(recipe_values(Path(folder)), [f"train.global_batch={GLOBAL_BATCH}", *settings])
    engine = PretrainEngine(validate(PretrainConfig, values, "test"), FEATURE_WIDTH, torch.device("cpu"))

    def weights() -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in engine.objective.named_parameters()}

    before = weights()
    world_size = torch.distributed.get_world_size()
    rank, share = torch.distributed.get_rank(), GLOBAL_BATCH // world_size
    for step in range(3):
        batch = {key: value[rank * share : (rank + 1) * share] for key, value in make_batch(step).items()}
        norm = take_step(engine, [ModelInputs(**batch)], 1e-2).grad_norm
    return before, weights(), norm


def check(folder: str) -> None:
    for precision in ("fp32", "bf16"):
        patterns = "optim.freeze=[blocks.0.*,projector.*,class_embed.weight]"
        before, after, norm = trained(folder, [f"parallel.precision={precision}", patterns])
        stays = {name for name in before if torch.equal(before[name], after[name])}
        expected = {
            name
            for name in before
            if name.startswith(("transformer.blocks.0.", "projector.", "transformer.class_embed"))
        }
        assert expected <= stays
        assert expected <= stays
        assert precision == "bf16" or stays == expected  # small steps may round to none
        assert 0 < norm < trained(folder, [f"parallel.precision={precision}"])[2]


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_weights_stay_to_the_bit(tmp_path: Path, world_size: int) -> None:
    run_on_ranks(world_size, check, str(tmp_path))


def check_bias(folder: str) -> None:
    from mepa_ds.engine.engine import PretrainEngine

    settings = [f"train.global_batch={GLOBAL_BATCH}", "model.moe.bias_rate=0.01", "optim.freeze=[blocks.1.*]"]
    values = apply_overrides(recipe_values(Path(folder)), settings)
    engine = PretrainEngine(validate(PretrainConfig, values, "test"), FEATURE_WIDTH, torch.device("cpu"))
    take_step(engine, [ModelInputs(**make_batch(0))], 1e-2)
    steps = {name: tensor for name, tensor in engine.objective.named_buffers() if name.endswith("bias_steps_E")}
    moved = {name: bool(tensor.any()) for name, tensor in steps.items()}
    assert moved == {f"transformer.blocks.{n}.ffn.router.bias_steps_E": n == 0 for n in range(2)}


def test_the_choice_of_a_frozen_router_stays(tmp_path: Path) -> None:
    """Loss-free balancing moves no weight, but what the exported file says, and which experts a token gets."""
    run_on_ranks(1, check_bias, str(tmp_path))


def test_patterns() -> None:
    assert frozen_names(NAMES, ["blocks.*.attention.*"]) == {NAMES[0]}
    assert frozen_names(NAMES, ["blocks.[0-1].*"]) == set(NAMES[:2])
    assert frozen_names(NAMES, ["projector.*", "blocks.1*"]) == set(NAMES[1:])
    with pytest.raises(UserError, match=r"optim\.freeze: 'block\.0\.\*' freezes nothing; .* such as blocks\."):
        frozen_names(NAMES, ["block.0.*"])
    with pytest.raises(UserError, match="freezes everything; leave something to train"):
        frozen_names(NAMES, ["*"])
