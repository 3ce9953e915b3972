"""The sampler against images that VAR's own sampler made, and its own promises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mepa_ds.errors import UserError
from mepa_ds.loops.sampling import draw_top, keep_top, sample
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.var_fixtures import TINY_SCALES, fixture_state, vector

LAYOUTS = ["adaln", "shared", "adaln_nol2"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_var(fixture_state("tiny_vae"), scales=TINY_SCALES)


@pytest.fixture
def vars_threads() -> Iterator[None]:
    """The tiny decoder amplifies rounding (5e-4 between one thread and two): VAR's images were made with several."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def model_of(layout: str) -> NextScaleTransformer:
    return NextScaleTransformer.from_var(fixture_state(f"tiny_var_{layout}"), scales=TINY_SCALES)


@pytest.mark.usefixtures("vars_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_image_is_vars(tokenizer: Tokenizer, layout: str) -> None:
    images = sample(model_of(layout), tokenizer, vector("labels"), cfg=1.5, top_k=1)
    torch.testing.assert_close(images, vector(f"greedy_{layout}"), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("vars_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_image_is_vars_with_its_order_of_draws(tokenizer: Tokenizer, layout: str) -> None:
    images = sample(model_of(layout), tokenizer, vector("labels"), cfg=1.5, top_k=20, top_p=0.9, seed=3, rng="var")
    torch.testing.assert_close(images, vector(f"sample_{layout}"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("smooth", [False, True])
def test_images_do_not_depend_on_the_batch_split(tokenizer: Tokenizer, smooth: bool) -> None:
    model, labels = model_of("adaln"), [3, 1, 4, 1, 5]
    whole = sample(model, tokenizer, labels, seed=7, smooth=smooth)
    split = sample(model, tokenizer, labels, seed=7, smooth=smooth, batch_size=2)
    tail = sample(model, tokenizer, labels[3:], seed=7, smooth=smooth, first_index=3)
    # The codes are the same; the decoder's convolutions round differently for another batch size (seen: 1.5e-4).
    torch.testing.assert_close(split, whole, atol=1e-3, rtol=0)
    torch.testing.assert_close(tail, whole[3:], atol=1e-3, rtol=0)
    assert not torch.equal(whole[1], whole[3])  # the same class twice is two images


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
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 6) * 2
    logits[..., 3] = -torch.inf
    expected = keep_top(logits, top_k, top_p).softmax(-1)[0, 0]
    uniform = (torch.arange(10000) + 0.5) / 10000
    codes = draw_top(logits.expand(10000, 1, 6), top_k, top_p, uniform[:, None])
    found = codes.flatten().bincount(minlength=6) / 10000
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


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
            mass, chosen = 0.0, []
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
