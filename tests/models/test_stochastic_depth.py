"""Stochastic depth: the caller draws a factor for each block, branch and image; here it is held against the gates."""

from __future__ import annotations

import torch

from mepa_ds.models.transformer import NextScaleTransformer


def make_model() -> NextScaleTransformer:
    """With gates and head large enough that every branch shows in the logits."""
    return NextScaleTransformer.from_preset(
        "mepa-d2", width=32, num_heads=2, num_classes=3, scales=(1, 2, 3), codebook_size=16, code_width=4,
        head_init=5.0, adaln_gamma_init=1.0,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_a_factor_scales_the_branch_of_its_block_and_image_alone() -> None:
    """A factor is the same as a gate that is so much larger."""
    model, labels_B = make_model(), torch.tensor([0, 2])
    inputs_BLZ = torch.randn(2, 13, 4, generator=torch.Generator().manual_seed(0))
    plain = model(labels_B, inputs_BLZ).logits_BLV
    width = model.config.C
    for block in range(2):
        for branch in range(2):
            factors_D2B = torch.ones(2, 2, 2)
            factors_D2B[block, branch, 1] = 2.5
            found = model(labels_B, inputs_BLZ, branch_scale_D2B=factors_D2B).logits_BLV
            larger = make_model()
            larger.load_state_dict(model.state_dict())
            rows = slice(branch * width, (branch + 1) * width)  # gamma1, gamma2 come first
            for name in ("weight", "bias"):
                larger.get_parameter(f"blocks.{block}.adaln.{name}")[rows] *= 2.5
            expected = larger(labels_B, inputs_BLZ).logits_BLV
            torch.testing.assert_close(found[0], plain[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)
            assert (found[1] - plain[1]).abs().max() > 0.01


@torch.no_grad()
def test_a_dropped_block_is_not_there() -> None:
    model, labels_B = make_model(), torch.tensor([0, 2])
    inputs_BLZ = torch.randn(2, 13, 4, generator=torch.Generator().manual_seed(1))
    factors_D2B = torch.ones(2, 2, 2)
    factors_D2B[1] = 0
    found = model(labels_B, inputs_BLZ, branch_scale_D2B=factors_D2B).logits_BLV
    del model.blocks[1]
    torch.testing.assert_close(found, model(labels_B, inputs_BLZ).logits_BLV, atol=1e-6, rtol=1e-6)
