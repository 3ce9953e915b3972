"""HMAR's files: VAR's network with Markovian attention, as its pretraining and its masked fine-tuning store it.

benchmarks/hmar_peer.py compares with HMAR's own code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.models import attention
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.flops import forward_flops_by_part
from mepa_ds.scales import ScaleSchedule
from tests.var_fixtures import TINY_SCALES, fixture_state, vector

SCHEDULE = ScaleSchedule.of(TINY_SCALES)


def hmars_state() -> dict[str, Tensor]:
    """VAR's tiny network with HMAR's mask, as HMAR's pretraining stores it."""
    scale_L = SCHEDULE.scale_index_L()
    mask_LL = torch.where(scale_L[:, None] == scale_L, 0.0, -torch.inf)
    return {**fixture_state("tiny_var_adaln"), "attn_bias_for_masking": mask_LL[None, None]}


def fine_tuned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same after masked fine-tuning of its last block: names as in HMAR's published files."""
    found: dict[str, Tensor] = {"mask_embed.weight": torch.zeros(1, 128)}
    for name, tensor in state.items():
        if name.startswith("blocks.0."):
            found[name.replace("blocks.0.", "base_blocks.0.")] = tensor
        elif name.startswith("blocks.1."):
            found[name.replace("blocks.1.", "ns_blocks.0.")] = tensor
            found[name.replace("blocks.1.", "mask_blocks.0.")] = tensor + 1
        elif name.startswith("head"):
            found |= {f"ns_{name}": tensor, f"mask_{name}": tensor + 1}
        else:
            found[name.replace("word_embed.bias", "word_embed_bias")] = tensor
    return found


def logits_by_a_mask(state: dict[str, Tensor]) -> Tensor:
    """VAR's network with a dense block-diagonal mask in its attention."""
    scale_L = SCHEDULE.scale_index_L()

    def masked(q: Tensor, k: Tensor, v: Tensor, bounds: Any, softmax_scale: float) -> Tensor:
        mask_LL = scale_L[:, None] == scale_L
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, scale=softmax_scale).transpose(1, 2)

    model = NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"))
    with patch.object(attention, "prefix_attention", masked), torch.no_grad():
        return model(vector("labels"), vector("teacher_input")).logits_BLV


@pytest.mark.parametrize("published", [False, True])
def test_both_files_give_hmars_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str], published: bool) -> None:
    state = hmars_state()
    tree = fine_tuned(state) if published else {"trainer": {"transformer_wo_ddp": state}}
    torch.save(tree, tmp_path / "hmar.pth")
    for _ in range(2):
        model = NextScaleTransformer.open(tmp_path / "hmar.pth")
    assert model.config.markovian
    assert model.config.depth == 2
    with torch.no_grad():
        found = model(vector("labels"), vector("teacher_input")).logits_BLV
    torch.testing.assert_close(found, logits_by_a_mask(state), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, vector("logits_adaln"), atol=1e-2)
    said = capsys.readouterr().err
    assert said.count("tensors of masked refinement (mask_blocks, mask_head, ...) are left out") == published
    assert said.count("took the weights under 'trainer.transformer_wo_ddp'") == (not published)


def test_a_mask_of_neither_is_refused() -> None:
    state = hmars_state()
    state["attn_bias_for_masking"][0, 0, 5:, 0] = -torch.inf
    state["attn_bias_for_masking"][0, 0, 3, 0] = 0.0
    with pytest.raises(UserError, match="trained with a mask of its own"):
        NextScaleTransformer.from_var(state)
    state["attn_bias_for_masking"] = torch.zeros(1, 1, 7, 7)
    assert not NextScaleTransformer.from_var(state).config.markovian


@pytest.mark.parametrize("hidden", [-1e9, torch.finfo(torch.float32).min, True, False])
def test_masks_of_other_programs_are_read_as_they_are_meant(hidden: float | bool) -> None:
    """Minus infinity by a large number, or booleans of either sense; taken for VAR's, the model would be another."""
    for state, markovian in ((hmars_state(), True), (fixture_state("tiny_var_adaln"), False)):
        hides = state["attn_bias_for_masking"] < 0
        mask = hides == hidden if isinstance(hidden, bool) else torch.where(hides, hidden, 0.0)
        for form in (mask, mask[0, 0]):
            model = NextScaleTransformer.from_var({**state, "attn_bias_for_masking": form})
            assert model.config.markovian == markovian


def test_a_file_with_both_forms_of_a_name_is_refused() -> None:
    state = fine_tuned(hmars_state())
    own = fixture_state("tiny_var_adaln")
    for name in ("head.weight", "blocks.1.ffn.fc1.bias", "word_embed.bias"):
        with pytest.raises(UserError, match="1 unexpected: "):
            NextScaleTransformer.from_var({**state, name: own[name]})


def test_flops_count_what_is_attended_to() -> None:
    config = NextScaleTransformer.from_var(hmars_state()).config
    full = config.model_copy(update={"markovian": False})
    share = sum(n * n for n in SCHEDULE.lengths) / sum((end - start) * end for start, end in SCHEDULE.bounds)
    own, all_coarser = (forward_flops_by_part(each)["attention"] for each in (config, full))
    assert own / all_coarser == pytest.approx(share)
