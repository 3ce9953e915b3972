"""A MoE model built from a dense one starts where that one is."""

from __future__ import annotations

import itertools

import pytest
import torch

from mepa_ds.config.model import MoEConfig
from mepa_ds.errors import UserError
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.models.upcycling import upcycle
from tests.var_fixtures import TINY_SCALES, fixture_state, vector


def dense_model() -> NextScaleTransformer:
    return NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"), scales=TINY_SCALES)


@pytest.mark.parametrize(
    ("router", "renormalize", "shared", "top_k"),
    [*itertools.product(["stmoe"], [True, False], [True, False], [1, 2, 3]), ("smoe", False, True, 2)],
)
def test_copies_give_the_dense_output(router: str, renormalize: bool, shared: bool, top_k: int) -> None:
    moe = MoEConfig(router=router, renormalize=renormalize, shared_expert=shared, top_k=top_k, num_experts=5)
    model = upcycle(dense_model(), moe)
    with torch.no_grad():
        output = model(vector("labels"), vector("teacher_input"))
    torch.testing.assert_close(output.logits_BLV, vector("logits_adaln"), atol=2e-5, rtol=1e-4)
    if router == "stmoe":
        load = output.routing[0].counts_SE.sum(0)
        assert (load > 0).sum() > 1  # tokens are spread, not all sent to the first experts


def test_slices_cover_every_hidden_unit_and_all_of_them_make_the_dense_ffn() -> None:
    dense = dense_model()
    # Experts of a quarter of the width, all four chosen, no shared one: every token passes every slice once.
    moe = MoEConfig(num_experts=4, top_k=4, shared_expert=False, expert_ratio=1.0)
    with torch.no_grad():
        output = upcycle(dense, moe)(vector("labels"), vector("teacher_input"))
    torch.testing.assert_close(output.logits_BLV, vector("logits_adaln"), atol=2e-5, rtol=1e-4)


def test_experts_wider_than_the_ffn_are_refused() -> None:
    with pytest.raises(UserError, match=r"expert_ratio: experts of hidden width 1024 .* FFN of 512"):
        upcycle(dense_model(), MoEConfig(expert_ratio=8.0))
    with pytest.raises(UserError, match="experts already"):
        upcycle(upcycle(dense_model(), MoEConfig()), MoEConfig())
