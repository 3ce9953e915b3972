"""Names of sizes, the family's table, and the numbers of weights and FLOPs that studies are made of."""

from __future__ import annotations

import pytest
from torch import nn

from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig, MoEConfig
from mepa_ds.errors import UserError
from mepa_ds.models.summary import count_parameters
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.flops import forward_flops, forward_flops_by_part
from mepa_ds.scaling.family import VAR_DEPTHS, family_row, format_family, member, state_bytes
from mepa_ds.scaling.sizes import size_values

TINY = {"scales": [1, 2, 3], "codebook_size": 32, "code_width": 4, "num_classes": 3}
EXPERTS = MoEConfig(num_experts=4, top_k=2, expert_ratio=1.0)


@pytest.mark.parametrize(
    ("name", "head_width", "values"),
    [
        ("d16", 64, (16, 1024, 16)),
        ("d16w768", 64, (16, 768, 12)),
        ("d16w768h8", 64, (16, 768, 8)),
        ("d4w96", 16, (4, 96, 6)),
        ("d36", 16, (36, 2304, 36)),
    ],
)
def test_a_name_gives_depth_width_and_heads(name: str, head_width: int, values: tuple[int, int, int]) -> None:
    assert tuple(size_values(name, head_width).values()) == values


@pytest.mark.parametrize("name", ["16", "d0", "d4w", "w128", "d4h2w64", "d4w100", "d4w96h5", "D4"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        size_values(name)


@pytest.mark.parametrize("moe", [None, EXPERTS, MoEConfig(num_experts=3, top_k=1, shared_expert=False, router="smoe")])
def test_weights_by_kind_are_those_of_the_model(moe: MoEConfig | None) -> None:
    """By the names of the parameters: each is in one kind, and `matrix` is 2-D weights that every token meets."""
    config = member("d2w32", moe, 16, TINY)
    model, counts = NextScaleTransformer(config), count_parameters(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert counts.total == sum(sizes.values())
    assert counts.adaln == sum(size for name, size in sizes.items() if "adaln" in name)
    assert counts.embedding == sum(size for name, size in sizes.items() if "_embed" in name)
    linear = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "adaln" not in name]
    matrix = sum(m.weight.numel() for m in linear if m is not model.word_embed)
    if moe is not None:
        hidden = config.expert_hidden
        matrix += config.depth * moe.top_k * 2 * config.C * hidden
        assert counts.experts == config.depth * moe.num_experts * (2 * config.C * hidden + hidden + config.C)
    assert counts.matrix == matrix
    unused = 0 if moe is None else counts.experts * (moe.num_experts - moe.top_k) // moe.num_experts
    assert counts.total - counts.active == unused


@pytest.mark.parametrize("moe", [None, EXPERTS])
def test_flops_are_those_of_the_models_matrices(moe: MoEConfig | None) -> None:
    """Two for each weight of a matrix and token that meets it, the head's too, and attention query by query."""
    config = member("d2w32", moe, 16, TINY)
    flops = 0
    for name, weight in NextScaleTransformer(config).named_parameters():
        looked_up = "embed" in name and "word" not in name
        added = any(part in name for part in ("bias", "scale_logits", "temperature"))
        if weight.ndim < 2 or looked_up or added:
            continue
        tokens = 1 if "adaln" in name else 13 if "word" in name else 14
        used = EXPERTS.top_k / EXPERTS.num_experts if ".experts." in name else 1
        flops += int(2 * weight.numel() * tokens * used)
    for scale, side in enumerate(config.scales):
        keys = sum(s * s for s in config.scales[: scale + 1])
        for _query in range(side * side):
            flops += config.depth * 2 * 2 * keys * config.C  # scores, and the sum of values
    parts = forward_flops_by_part(config)
    assert sum(parts.values()) == flops
    assert forward_flops(config) == flops
    assert parts["head"] == 2 * 14 * 32 * 32


def test_var_d16_as_published() -> None:
    """310M parameters (VAR's table); a third of them in AdaLN, which is 0.07 % of the FLOPs; attention 6.3 %."""
    row = family_row("d16", member("d16", None))
    assert row["params_total"] / 1e6 == pytest.approx(310, abs=1)
    assert row["params_adaln"] / row["params_total"] == pytest.approx(0.33, abs=0.01)
    assert row["flops"]["adaln"] / row["flops_image"] == pytest.approx(0.0007, abs=1e-4)
    assert row["flops"]["attention"] / row["flops_image"] == pytest.approx(0.063, abs=1e-3)


def test_the_table_has_a_line_a_model() -> None:
    rows = [family_row(f"d{depth}", member(f"d{depth}", None)) for depth in VAR_DEPTHS]
    lines = format_family(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[2].split()[:2] == ["d8", "41.3"]


def test_zero_shares_all_but_the_weights() -> None:
    counts = count_parameters(member("d2w32", None, 16, TINY))
    alone, shared = state_bytes(counts, 1), state_bytes(counts, 4)
    assert sum(alone.values()) == 16 * counts.total
    assert sum(shared.values()) == 2 * counts.total + 14 * counts.total / 4


def test_a_member_is_the_recipes_model() -> None:
    config = validate(ModelConfig, {"preset": "var-d24"}, "")
    assert member("d24", None).model_dump(exclude={"preset", "width", "num_heads"}) == config.model_dump(
        exclude={"preset", "width", "num_heads"}
    )
    with pytest.raises(UserError, match="--sizes: 'x' is no size"):
        member("x", None)
