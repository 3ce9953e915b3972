"""The sampler against images that VAR's own sampler made, and its own promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.generation import scale_blocks
from mepa_ds.generation.by_scale import by_scale
from mepa_ds.generation.draws import SmoothDraw, draw_top, keep_top
from mepa_ds.generation.sampling import NonFiniteLogitsError, Rng, sample
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.var_fixtures import PIXEL_ATOL, TINY_SCALES, fixture_state, vector

LAYOUTS = ["adaln", "shared", "adaln_nol2"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_var(fixture_state("tiny_vae"), scales=TINY_SCALES)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The codes' rows (B, l, Z) of every scale that is sampled."""
    rows: list[Tensor] = []
    add_codes = MultiScaleQuantizer.add_codes

    def noting(self: MultiScaleQuantizer, f_hat: Tensor, codes_BlZ: Tensor, scale: int) -> Tensor:
        rows.append(codes_BlZ)
        return add_codes(self, f_hat, codes_BlZ, scale)

    monkeypatch.setattr(MultiScaleQuantizer, "add_codes", noting)
    return rows


def tokens_of(rows: list[Tensor], tokenizer: Tokenizer) -> Tensor:
    """(B, L) tokens whose codebook entries these are."""
    codes_BLZ = torch.cat(rows, dim=1)
    tokens_BL = torch.cdist(codes_BLZ, tokenizer.quantizer.codebook.weight).argmin(-1)
    assert torch.equal(tokenizer.quantizer.codebook.weight[tokens_BL], codes_BLZ)
    return tokens_BL


def model_of(layout: str) -> NextScaleTransformer:
    return NextScaleTransformer.from_var(fixture_state(f"tiny_var_{layout}"), scales=TINY_SCALES, num_heads=2)


def tokens_without_a_cache(
    model: NextScaleTransformer, tokenizer: Tokenizer, labels_B: Tensor, top_k: int, top_p: float, seed: int
) -> Tensor:
    """(B, L): VAR's sampling loop by the teacher-forced forward of the whole sequence, anew for each scale."""
    schedule, B = tokenizer.schedule, len(labels_B)
    rng = torch.Generator().manual_seed(seed)
    tokens_BL = torch.zeros(B, schedule.num_tokens, dtype=torch.int64)
    for scale, (start, end) in enumerate(schedule.bounds):
        inputs = tokenizer.inputs_from_tokens(tokens_BL)  # later scales do not reach this one
        none_B = torch.full_like(labels_B, model.config.num_classes)
        with torch.no_grad():
            conditional, other = (model(labels, inputs).logits_BLV[:, start:end] for labels in (labels_B, none_B))
        t = 1.5 * scale / (schedule.num_scales - 1)
        probs = keep_top((1 + t) * conditional - t * other, top_k, top_p).softmax(-1)
        tokens_BL[:, start:end] = torch.multinomial(probs.flatten(0, 1), 1, generator=rng).view(B, -1)
    return tokens_BL


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["greedy", "sample"])
def test_tokens_and_image_are_vars(tokenizer: Tokenizer, drawn: list[Tensor], layout: str, kind: str) -> None:
    """Random draws too, in VAR's order. The forward that makes the tokens here gives VAR's logits: another test."""
    top_k, top_p = {"greedy": (1, 0.0), "sample": (20, 0.9)}[kind]
    model, labels_B = model_of(layout), vector("labels")
    images = sample(model, tokenizer, labels_B, cfg=1.5, top_k=top_k, top_p=top_p, seed=3, rng="var")
    torch.testing.assert_close(images, vector(f"{kind}_{layout}"), atol=PIXEL_ATOL, rtol=0)
    tokens_BL = tokens_of(drawn, tokenizer)
    assert torch.equal(tokens_BL, tokens_without_a_cache(model, tokenizer, labels_B, top_k, top_p, seed=3))
    if kind == "greedy":
        drawn.clear()
        sample(model, tokenizer, labels_B, cfg=1.5, top_k=1)
        assert torch.equal(tokens_of(drawn, tokenizer), tokens_BL)


@pytest.mark.parametrize("changes", [{}, {"shared_adaln": True}, {"qk_norm": False}, {"markovian": True}])
def test_experts_sample_what_they_were_trained_on(
    tokenizer: Tokenizer, drawn: list[Tensor], changes: dict[str, object]
) -> None:
    """Scale by scale with a cache, a mixture of experts gives the tokens of its teacher-forced forward."""
    model = NextScaleTransformer.from_preset(
        "mepa-d2", num_classes=10, scales=TINY_SCALES, codebook_size=64, code_width=8, head_init=20.0,
        adaln_gamma_init=1.0, **changes,
    ).eval()  # fmt: skip
    labels_B = torch.tensor([3, 7, 1])
    sample(model, tokenizer, labels_B, cfg=1.5, top_k=20, top_p=0.9, seed=3, rng="var")
    tokens_BL = tokens_of(drawn, tokenizer)
    assert len(tokens_BL.unique()) > 10
    assert torch.equal(tokens_BL, tokens_without_a_cache(model, tokenizer, labels_B, 20, 0.9, seed=3))


@pytest.mark.parametrize("layout", ["dense", pytest.param("experts", marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same_codes(
    tokenizer: Tokenizer, drawn: list[Tensor], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Dynamo alone, which traces the blocks and keeps the cache's state right; code generation takes a minute."""
    monkeypatch.setattr(scale_blocks, "BACKEND", "eager")
    model = model_of("adaln")
    if layout == "experts":
        model = NextScaleTransformer.from_preset(
            "mepa-d2", num_classes=10, scales=TINY_SCALES, codebook_size=64, code_width=8, head_init=20.0
        ).eval()
    dispatchers = [getattr(block.ffn, "dispatcher", None) for block in model.blocks]
    images = [sample(model, tokenizer, [3, 1, 4], cfg=1.5, seed=5, compiled=compiled) for compiled in (False, True)]
    plain, compiled = torch.cat(drawn[: len(TINY_SCALES)], dim=1), torch.cat(drawn[len(TINY_SCALES) :], dim=1)
    assert torch.equal(compiled, plain)
    torch.testing.assert_close(images[1], images[0], atol=1e-5, rtol=0)
    assert [getattr(block.ffn, "dispatcher", None) for block in model.blocks] == dispatchers


def test_scales_without_guidance_need_no_unconditional_logits(
    tokenizer: Tokenizer, drawn: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first scale has weight 0: its head sees the conditional rows alone. Other tests compare with VAR."""
    rows: list[int] = []
    logits = NextScaleTransformer.logits

    def noting(self: NextScaleTransformer, x_BLC: Tensor, class_BC: Tensor) -> Tensor:
        rows.append(len(x_BLC))
        return logits(self, x_BLC, class_BC)

    monkeypatch.setattr(NextScaleTransformer, "logits", noting)
    sample(model_of("adaln"), tokenizer, [3, 1], cfg=1.5)
    assert rows == [2] + [4] * (len(TINY_SCALES) - 1)


@pytest.mark.parametrize("smooth", [False, True])
def test_images_do_not_depend_on_the_batch_split(tokenizer: Tokenizer, drawn: list[Tensor], smooth: bool) -> None:
    model, labels = model_of("adaln"), [3, 1, 4, 1, 5]

    def codes(labels: list[int], first_index: int = 0, batch_size: int | None = None) -> Tensor:
        drawn.clear()
        sample(model, tokenizer, labels, seed=7, smooth=smooth, first_index=first_index, batch_size=batch_size)
        batches = [torch.cat(drawn[start : start + 4], dim=1) for start in range(0, len(drawn), 4)]
        return torch.cat(batches)

    whole, split, tail = codes(labels), codes(labels, batch_size=2), codes(labels[3:], first_index=3)
    # Codes are choices, and those are the same; mixtures are numbers, and the temperature of the last scale, 0.0135,
    # makes 1e-6 of the logits 1e-4 of the weights (seen: 2e-4).
    tolerance = 1e-3 if smooth else 0
    torch.testing.assert_close(split, whole, atol=tolerance, rtol=0)
    torch.testing.assert_close(tail, whole[3:], atol=tolerance, rtol=0)
    assert not torch.equal(whole[1], whole[3])  # the same class twice is two images


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (5, 0.0), (0, 0.8), (5, 0.8)])
def test_smooth_draws_are_vars_more_smooth(top_k: int, top_p: float) -> None:
    """VAR's steps written out: `sample_with_top_k_top_p_` masks in place, then the Gumbel softmax sees what is left."""
    torch.manual_seed(1)
    codebook_VZ = torch.randn(12, 3)
    settings = by_scale(3, 1.5, "linear", None, 1.0, top_k, top_p)
    draw = SmoothDraw(0, np.arange(2), torch.Generator().manual_seed(3), settings)
    rng = torch.Generator().manual_seed(3)
    for scale in range(3):
        logits_BlV, ratio = torch.randn(2, 4, 12) * 2, scale / 2
        expected = logits_BlV.clone()
        if top_k:
            smallest = expected.topk(top_k, dim=-1)[0].amin(dim=-1, keepdim=True)
            expected.masked_fill_(expected < smallest, -torch.inf)
        if top_p:
            ascending, order = expected.sort(dim=-1, descending=False)
            remove = ascending.softmax(dim=-1).cumsum_(dim=-1) <= (1 - top_p)
            remove[..., -1:] = False
            expected.masked_fill_(remove.scatter(order.ndim - 1, order, remove), -torch.inf)
        torch.multinomial(expected.softmax(dim=-1).view(-1, 12), 1, replacement=True, generator=rng)
        temperature = max(0.27 * (1 - ratio * 0.95), 0.005)
        gumbels = -torch.empty_like(expected).exponential_(generator=rng).log()
        mixed = ((expected.mul(1 + ratio) + gumbels) / temperature).softmax(-1) @ codebook_VZ
        torch.testing.assert_close(draw(logits_BlV, scale, codebook_VZ), mixed, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rng", ["image", "var"])
def test_smooth_with_one_code_left_is_greedy(tokenizer: Tokenizer, drawn: list[Tensor], rng: Rng) -> None:
    model = model_of("adaln")
    sample(model, tokenizer, [2, 5], top_k=1, smooth=True, rng=rng)
    smooth = torch.cat(drawn, dim=1)
    drawn.clear()
    sample(model, tokenizer, [2, 5], top_k=1)
    torch.testing.assert_close(smooth, torch.cat(drawn, dim=1), atol=1e-6, rtol=0)


def test_every_place_draws_for_itself(tokenizer: Tokenizer, drawn: list[Tensor]) -> None:
    """From a flat distribution all codes come equally often, and no scale, place or image repeats another's draws."""
    model = model_of("adaln")
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    count = 24
    sample(model, tokenizer, [3] * count, cfg=0.0, top_k=0, top_p=0.0)
    tokens_BL = tokens_of(drawn, tokenizer)
    places, codes = tokens_BL.shape[1], model.config.codebook_size
    times = tokens_BL.flatten().bincount(minlength=codes)
    chi_square = ((times - count * places / codes) ** 2).sum() / (count * places / codes)
    assert chi_square < codes + 5 * (2 * codes) ** 0.5
    for rows in (tokens_BL, tokens_BL.T):  # images at a place; places of an image
        same = (rows[:, None] == rows).float().mean(-1)
        assert (same - torch.eye(len(rows))).max() < 0.35, "1 of 64 by chance"


def test_seed_decides(tokenizer: Tokenizer) -> None:
    model = model_of("adaln")
    first, again, other = (sample(model, tokenizer, [2], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_guidance_only_the_conditional_half_runs(tokenizer: Tokenizer) -> None:
    """cfg = 0 must give what a guided run gives with weight 0: t = 0 at the first scale of any run."""
    model = model_of("adaln")
    torch.testing.assert_close(
        sample(model, tokenizer, [2, 5], cfg=0.0, top_k=1),
        sample(model, tokenizer, [2, 5], cfg=1e-9, top_k=1),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (3, 0.0), (0, 0.7), (4, 0.8), (1, 0.0)])
def test_draws_follow_the_kept_probabilities(top_k: int, top_p: float) -> None:
    """Draws at evenly spaced uniform numbers against the distribution that VAR's filter leaves."""
    logits = torch.tensor([[[0.9, 0.2, 1.3, -torch.inf, 0.6, 0.0]]])  # flat: top_p cuts between codes, not at the first
    expected = keep_top(logits, top_k, top_p).softmax(-1)[0, 0]
    uniform = (torch.arange(10000) + 0.5) / 10000
    codes = draw_top(logits.expand(10000, 1, 6), top_k, top_p, uniform[:, None])
    found = codes.flatten().bincount(minlength=6) / 10000
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


# Of five codes with probabilities 0.30, 0.25, 0.20, 0.15 and 0.10: how many stay.
FLAT = [0.30, 0.25, 0.20, 0.15, 0.10]
KEPT = [
    ((0, 0.0), 5),
    ((0, 1.0), 5),
    ((3, 0.0), 3),
    ((9, 0.0), 5),
    ((0, 0.29), 1),
    ((0, 0.54), 2),
    ((0, 0.56), 3),
    ((0, 0.91), 5),
    ((2, 0.5), 1),  # of what top_k leaves, the first has 0.545: with top_p before top_k two would stay
    ((2, 0.6), 2),
    ((4, 0.6), 2),  # 0.333 + 0.278 of what is left; of all codes it would be three
    ((4, 0.9), 4),
]


@pytest.mark.parametrize(("limits", "count"), KEPT)
def test_top_k_comes_first_and_top_p_counts_what_it_leaves(limits: tuple[int, float], count: int) -> None:
    """Which codes stay, and how often each is drawn: numbers worked out by hand, from codes in no order."""
    order = [3, 0, 4, 1, 2]
    probs = torch.tensor([FLAT[rank] for rank in order])
    expected = torch.tensor([FLAT[rank] / sum(FLAT[:count]) if rank < count else 0.0 for rank in order])
    kept = keep_top(probs.log()[None, None], *limits)[0, 0]
    torch.testing.assert_close(kept.softmax(-1), expected)
    uniform = (torch.arange(20000) + 0.5) / 20000
    codes = draw_top(probs.log().expand(20000, 1, 5), *limits, uniform[:, None])
    torch.testing.assert_close(codes.flatten().bincount(minlength=5) / 20000, expected, atol=1e-4, rtol=0)


def test_the_largest_uniform_number_draws_a_possible_code() -> None:
    logits = torch.full((1, 1, 4096), -torch.inf)
    logits[..., :5] = torch.randn(5)
    codes = draw_top(logits.expand(1, 64, 4096), 900, 0.0, torch.full((1, 64), 1 - 2.0**-24))
    assert codes.max() < 5


def test_keep_top_against_a_plain_loop() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 12)
    kept = keep_top(logits, 6, 0.7)
    for b in range(2):
        for position in range(3):
            row = logits[b, position]
            best = row.argsort(descending=True)[:6]
            probs = row[best].softmax(0)
            mass, chosen = 0.0, list[int]()
            for code, p in zip(best.tolist(), probs.tolist(), strict=True):
                if mass < 0.7 or not chosen:
                    chosen.append(code)
                mass += p
            assert sorted(torch.isfinite(kept[b, position]).nonzero()[:, 0].tolist()) == sorted(chosen)


def test_bad_labels_and_foreign_tokenizers_are_refused(tokenizer: Tokenizer) -> None:
    model = model_of("adaln")
    with pytest.raises(UserError, match=r"labels: \[10\] are no classes of this model; give 0\.\.9"):
        sample(model, tokenizer, [1, 10])
    other = Tokenizer.from_var(fixture_state("tiny_vae"), scales=(1, 2, 4))
    with pytest.raises(UserError, match="tokenizer: its scales"):
        sample(model, other, [1])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([1], {"batch_size": 0}, r"batch_size: expected at least 1, or None .* got 0"),
        ([1], {"batch_size": -1}, r"batch_size: expected at least 1, or None .* got -1"),
        ([1], {"rng": "numpy"}, r"rng: expected one of image, var, got 'numpy'"),
        ([1.5, 2.0], {}, r"labels: expected a list of class numbers, got float32 of shape \(2,\)"),
        ([True], {}, r"labels: expected a list of class numbers, got bool"),
        ([[1, 2]], {}, r"labels: expected a list of class numbers, got int64 of shape \(1, 2\)"),
        ([[1, 2], [3]], {}, r"labels: expected a list of class numbers \("),
        (["cat"], {}, r"labels: expected a list of class numbers \("),
        (3, {}, r"labels: expected a list of class numbers, got int64 of shape \(\)"),
        ([1], {"top_k": -1}, "top_k: expected a whole number of at least 0, got -1"),
        ([1], {"top_k": 2.5}, r"top_k: expected a whole number of at least 0, got 2\.5"),
        ([1], {"top_k": None}, "top_k: expected a whole number of at least 0, got None"),
        ([1], {"seed": -3}, "seed: expected a whole number of at least 0, got -3"),
        ([1], {"first_index": 0.5}, r"first_index: expected a whole number of at least 0, got 0\.5"),
        ([1], {"top_p": 1.2}, r"top_p: expected a number in 0\.\.1, got 1\.2"),
        ([1], {"top_p": -0.1}, r"top_p: expected a number in 0\.\.1, got -0\.1"),
        ([1], {"top_p": float("nan")}, r"top_p: expected a number in 0\.\.1, got nan"),
        ([1], {"cfg": float("inf")}, r"cfg: expected a finite number such as 1\.5, got inf"),
        ([1], {"cfg": "2"}, r"cfg: expected a finite number such as 1\.5, got '2'"),
    ],
)
def test_bad_arguments(tokenizer: Tokenizer, labels: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(model_of("adaln"), tokenizer, labels, **options)


def test_a_model_in_training_samples_in_evaluation_mode(tokenizer: Tokenizer) -> None:
    """With its capacity limit on, tokens would be dropped, and others with another batch."""
    model = NextScaleTransformer.from_preset(
        "mepa-d2", num_classes=10, scales=TINY_SCALES, codebook_size=64, code_width=8, head_init=20.0,
        adaln_gamma_init=1.0, moe={"capacity_factor": 0.25},
    ).eval()  # fmt: skip
    expected = sample(model, tokenizer, [3, 7], seed=1)
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(sample(model, tokenizer, [3, 7], seed=1), expected)
    assert [module.training for module in model.modules()] == modes
    model.position_embed.data[0, 5] = torch.nan
    with pytest.raises(NonFiniteLogitsError):
        sample(model, tokenizer, [1])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("smooth", [False, True])
@torch.no_grad()
def test_a_model_in_bf16(tokenizer: Tokenizer, drawn: list[Tensor], smooth: bool) -> None:
    """Most greedy codes are those of the model in fp32, and nothing of the tokenizer's is rounded."""
    model, labels_B = model_of("adaln"), vector("labels")
    sample(model, tokenizer, labels_B, top_k=1, smooth=smooth)
    expected_BLZ = torch.cat(drawn, dim=1)
    drawn.clear()
    images = sample(model.to(torch.bfloat16), tokenizer, labels_B, top_k=1, smooth=smooth)
    assert images.dtype == torch.float32
    assert images.shape == (len(labels_B), 3, 64, 64)
    found_BLZ = torch.cat(drawn, dim=1)
    assert found_BLZ.dtype == torch.float32
    same_BL = torch.isclose(found_BLZ, expected_BLZ, atol=1e-6).all(-1)
    assert same_BL.float().mean() > 0.8


def test_no_labels_no_images(tokenizer: Tokenizer) -> None:
    assert sample(model_of("adaln"), tokenizer, []).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("rng", ["image", "var"])
@pytest.mark.parametrize("smooth", [False, True])
def test_broken_weights_are_an_error_not_an_image(tokenizer: Tokenizer, rng: Rng, smooth: bool) -> None:
    model = model_of("adaln")
    model.position_embed.data[0, 5] = torch.nan  # in the third scale
    assert issubclass(NonFiniteLogitsError, UserError)  # to an entry point it is a message
    with pytest.raises(NonFiniteLogitsError, match="sampling: the model's logits are NaN or infinite"):
        sample(model, tokenizer, [1], rng=rng, smooth=smooth)
