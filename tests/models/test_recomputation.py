"""Activation checkpointing: it changes no gradient and no routing, and selective mode keeps the experts' products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mepa_ds.models.recomputation import Recompute
from mepa_ds.models.transformer import NextScaleTransformer
from tests.models.test_moe import SCALES


@pytest.mark.parametrize("recompute", ["blocks", "selective"])
@pytest.mark.parametrize("moe", [{}, {"capacity_factor": 1.0}, {"router": "smoe"}])
def test_recomputation_changes_no_gradient(recompute: Recompute, moe: dict[str, object]) -> None:
    model = NextScaleTransformer.from_preset(
        "mepa-d2", width=32, num_heads=2, num_classes=3, scales=SCALES, codebook_size=16, code_width=4, moe=moe
    )
    labels, inputs = torch.tensor([0, 1, 2]), torch.randn(3, 13, 4)

    def run() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        output = model(labels, inputs)
        loss = output.logits_BLV.square().mean() + sum(s.prob_sum_SE.square().mean() for s in output.routing.values())
        counts = [s.counts_SE for s in output.routing.values()]
        return loss, list(torch.autograd.grad(loss, list(model.parameters()))), counts

    plain = run()
    model.recompute = recompute
    recomputed = run()
    torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("recompute", ["blocks", "selective"])
@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"renormalize": True},
        {"bias_rate": 0.01},
        {"capacity_factor": 0.75},
        {"capacity_factor": 0.75, "bias_rate": 0.01},
        {"capacity_factor": 0.75, "renormalize": True},
        {"router": "expert_choice"},
    ],
)
def test_recomputation_never_routes_anew(
    monkeypatch: pytest.MonkeyPatch, recompute: Recompute, moe: dict[str, object]
) -> None:
    """A router whose logits come out differently every time it is asked: what it chose first must stand."""
    from mepa_ds.models.moe import dispatch
    from mepa_ds.models.moe.routing import ScaleTokenRouter

    clean = ScaleTokenRouter.logits
    monkeypatch.setattr(
        ScaleTokenRouter, "logits", lambda self, x, scale: clean(self, x, scale) + 3 * torch.randn(len(x), 8)
    )
    seen: list[tuple[Tensor, Tensor | None]] = []
    sort = dispatch.TokenPermutation.__init__

    def spy(self, x_TC, routing, num_experts) -> None:  # type: ignore[no-untyped-def]
        seen.append((routing.expert_index_TK.clone(), routing.kept_TK))
        sort(self, x_TC, routing, num_experts)

    monkeypatch.setattr(dispatch.TokenPermutation, "__init__", spy)
    model = NextScaleTransformer.from_preset(
        "mepa-d2", width=32, num_heads=2, num_classes=3, scales=SCALES, codebook_size=16, code_width=4, moe=moe
    )
    model.recompute = recompute
    model(torch.tensor([0, 1]), torch.randn(2, 13, 4)).logits_BLV.square().mean().backward()
    first, second, second_again, first_again = seen  # forward of two blocks, then backward in reverse
    for (index_TK, kept_TK), (index_again_TK, kept_again_TK) in ((first, first_again), (second, second_again)):
        assert torch.equal(index_TK, index_again_TK)
        assert (kept_TK is not None) == ("capacity_factor" in moe or "router" in moe)
        if kept_TK is not None:
            assert kept_again_TK is not None
            assert torch.equal(kept_TK, kept_again_TK)
            assert not kept_TK.all()


@pytest.mark.parametrize(("recompute", "loops"), [("none", 4), ("selective", 4), ("blocks", 6)])
def test_selective_recomputation_keeps_the_experts_products(
    monkeypatch: pytest.MonkeyPatch, recompute: Recompute, loops: int
) -> None:
    """Two blocks loop over experts once forward and once backward; only "blocks" computes the forward again."""
    from mepa_ds.models.moe import expert_loop

    seen: list[int] = []
    slices = expert_loop._padded_slices

    def counted(counts: list[int], multiple: int) -> Iterator[tuple[int, slice, slice]]:
        seen.append(len(counts))
        return slices(counts, multiple)

    monkeypatch.setattr(expert_loop, "_padded_slices", counted)
    model = NextScaleTransformer.from_preset(
        "mepa-d2", width=32, num_heads=2, num_classes=3, scales=SCALES, codebook_size=16, code_width=4
    )
    model.recompute = recompute
    model(torch.tensor([0, 1]), torch.randn(2, 13, 4)).logits_BLV.square().mean().backward()
    assert seen == [8] * loops
