"""Guidance and temperature scale by scale, no class, classes to lead away from, and mixed classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mepa_ds.errors import UserError
from mepa_ds.generation.by_scale import by_scale
from mepa_ds.generation.sampling import sample
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.var_fixtures import TINY_SCALES, fixture_state


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_var(fixture_state("tiny_vae"), scales=TINY_SCALES)


@pytest.fixture(scope="module")
def model() -> NextScaleTransformer:
    return NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"), scales=TINY_SCALES, num_heads=2)


def settings(**changes: Any) -> Any:
    given = {"cfg": 1.5, "cfg_schedule": "linear", "guided_scales": None, "temperature": 1.0, "top_k": 9, "top_p": 0.9}
    return by_scale(4, **{**given, **changes})


def test_weights_of_guidance() -> None:
    assert settings().cfg_S == (0.0, 0.5, 1.0, 1.5)
    assert settings(cfg_schedule="constant").cfg_S == (1.5,) * 4
    assert settings(cfg=[1, 0, 2, 3]).cfg_S == (1, 0, 2, 3)
    assert settings(guided_scales=(2, 3)).cfg_S == (0.0, 0.5, 1.0, 0.0)
    assert settings(cfg=3, cfg_schedule="constant", guided_scales=(4, 4)).cfg_S == (0, 0, 0, 3)
    assert settings(top_k=[1, 2, 3, 4], top_p=(0, 0.5, 1, 0.9)).top_k_S == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg": [1.0, 2.0]}, "cfg: has 2 values, the model 4 scales"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule: expected one of linear, constant, got 'cosine'"),
        (
            {"guided_scales": (0, 2)},
            r"guided_scales: expected the first and the last guided scale, 1\.\.4, got \(0, 2\)",
        ),
        ({"guided_scales": (3, 2)}, "guided_scales"),
        ({"guided_scales": 3}, "guided_scales"),
        ({"temperature": 0}, "temperature: expected a finite number above 0, such as 1, got 0"),
        ({"temperature": [1, 1, 1, float("inf")]}, "temperature: .* got inf"),
        ({"top_k": [1, 2, 3, 2.5]}, r"top_k: expected a whole number of at least 0, got 2\.5"),
        ({"top_p": [0.1, 0.2, 0.3, 2]}, r"top_p: expected a number in 0\.\.1, got 2"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**changes)


def images(model: NextScaleTransformer, tokenizer: Tokenizer, labels: Any, **options: Any) -> torch.Tensor:
    return sample(model, tokenizer, labels, **{"cfg": 1.5, "top_k": 20, "seed": 3, **options})


def test_a_sequence_is_what_it_spreads_to(model: NextScaleTransformer, tokenizer: Tokenizer) -> None:
    plain = images(model, tokenizer, [1, 7])
    spread = images(
        model, tokenizer, [1, 7], cfg=[0, 0.5, 1.0, 1.5], top_k=[20] * 4, top_p=[0.96] * 4, temperature=[1.0] * 4
    )
    assert torch.equal(plain, spread)


def test_a_low_temperature_is_greedy(model: NextScaleTransformer, tokenizer: Tokenizer) -> None:
    greedy = images(model, tokenizer, [1, 7], top_k=1)
    assert torch.equal(images(model, tokenizer, [1, 7], temperature=1e-6), greedy)
    assert not torch.equal(images(model, tokenizer, [1, 7], temperature=1.0), greedy)


def test_no_class(model: NextScaleTransformer, tokenizer: Tokenizer) -> None:
    """The null class's own distribution, which guidance away from itself does not change."""
    unconditional = images(model, tokenizer, [None, 3], cfg=0)
    torch.testing.assert_close(images(model, tokenizer, [None, 3])[0], unconditional[0], atol=1e-5, rtol=0)
    assert torch.equal(images(model, tokenizer, [2, 3], cfg=0)[1], unconditional[1])


def test_guidance_away_from_a_class(model: NextScaleTransformer, tokenizer: Tokenizer) -> None:
    """Away from the class itself is no guidance; away from no class is the usual one."""
    unguided = images(model, tokenizer, [3, 3], cfg=0)
    away = images(model, tokenizer, [3, 3], negative=[3, None])
    torch.testing.assert_close(away[0], unguided[0], atol=1e-5, rtol=0)
    assert torch.equal(away[1], images(model, tokenizer, [3, 3])[1])


def test_mixed_classes(model: NextScaleTransformer, tokenizer: Tokenizer) -> None:
    plain = images(model, tokenizer, [3, 5])
    assert torch.equal(images(model, tokenizer, [3, 5], towards=[5, 3], share=0), plain)
    swapped = images(model, tokenizer, [5, 3], towards=[3, 5], share=1)
    torch.testing.assert_close(swapped, plain, atol=1e-5, rtol=0)
    halves = images(model, tokenizer, [3, 5], towards=[5, 3], share=np.float32(0.5), cfg=0, top_k=1)
    torch.testing.assert_close(halves[0], halves[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative": [1]}, "negative: has 1 classes for 2 labels; give one for each"),
        ({"towards": [1, 10]}, r"towards: \[10\] are no classes of this model"),
        ({"towards": [1, 2], "share": 1.5}, r"share: expected a number in 0\.\.1, got 1\.5"),
    ],
)
def test_bad_classes(model: NextScaleTransformer, tokenizer: Tokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        images(model, tokenizer, [1, 2], **options)
