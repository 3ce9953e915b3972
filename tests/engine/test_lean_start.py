"""A start leaves out what no run needs, and what is left out changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mepa_ds.engine.starting.lean_start import NothingDrawn, materialise

HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "torch.distributed.tensor", "sympy")
FIRST_STEP = f"""
import sys
from pathlib import Path
import torch
from mepa_ds import distributed
from mepa_ds.config.base import apply_overrides, validate
from mepa_ds.config.pretrain import PretrainConfig
import mepa_ds.pretrain.run
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.objective.objective import ModelInputs
from tests.engine.test_expert_parallel import make_batch
from tests.engine.ranks import take_step
from tests.tiny_run import FEATURE_WIDTH, recipe_values

device = distributed.start(distributed.read_launch())
values = apply_overrides(recipe_values(Path(sys.argv[1])), sys.argv[2:])
engine = PretrainEngine(validate(PretrainConfig, values, "test"), FEATURE_WIDTH, device)
taken = take_step(engine, [ModelInputs(**make_batch(0))], lr=0.01)
with engine.evaluating():
    pass
print(taken.applied, [name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize("settings", [[], ["model.moe=null", "optim.ema=0.9"]], ids=["experts", "dense"])
def test_a_first_step_imports_no_compiler(tmp_path: Path, settings: list[str]) -> None:
    words = [sys.executable, "-c", FIRST_STEP, str(tmp_path), "train.global_batch=4", *settings]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1:] == ["True []"], result.stdout + result.stderr


def test_materialised_as_pytorch_does_it() -> None:
    def on_meta() -> nn.Module:
        with torch.device("meta"), NothingDrawn():
            model = nn.Sequential(nn.Linear(3, 4, dtype=torch.bfloat16), nn.Embedding(5, 2), nn.BatchNorm1d(4))
        model[1].weight.requires_grad_(False)
        model[0].register_buffer("scratch", torch.empty(2, device="meta"), persistent=False)
        return model

    ours, theirs = on_meta(), on_meta().to_empty(device="cpu")
    materialise(ours, torch.device("cpu"))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for pairs in (
        zip(ours.named_parameters(), theirs.named_parameters(), strict=True),
        zip(ours.named_buffers(), theirs.named_buffers(), strict=True),
    ):
        for (name, mine), (other, other_s) in pairs:
            assert name == other
            assert (type(mine), mine.shape, mine.dtype, mine.device, mine.requires_grad) == (
                type(other_s), other_s.shape, other_s.dtype, other_s.device, other_s.requires_grad,
            )  # fmt: skip
