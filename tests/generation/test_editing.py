"""Edits of given images: VAR's own pictures, and what stays stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mepa_ds.errors import UserError
from mepa_ds.generation.editing import Given, keep_outside, keep_scales
from mepa_ds.generation.sampling import sample
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.scales import ScaleSchedule
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.var_fixtures import FOLDER, PIXEL_ATOL, TINY_SCALES, fixture_state, vector

SCHEDULE = ScaleSchedule.of(TINY_SCALES)
LAYOUTS = ["adaln", "shared"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_var(fixture_state("tiny_vae"), scales=TINY_SCALES)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> list[torch.Tensor]:
    """Codes of each scale as they were added."""
    codes: list[torch.Tensor] = []
    add = tokenizer.quantizer.add_codes

    def noting(f_hat: torch.Tensor, codes_BlZ: torch.Tensor, scale: int) -> torch.Tensor:
        codes.append(codes_BlZ)
        return add(f_hat, codes_BlZ, scale)

    monkeypatch.setattr(tokenizer.quantizer, "add_codes", noting)
    return codes


def model_of(layout: str) -> NextScaleTransformer:
    return NextScaleTransformer.from_var(fixture_state(f"tiny_var_{layout}"), scales=TINY_SCALES, num_heads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["in", "out"])
@pytest.mark.parametrize("kind", ["greedy", "sample"])
def test_edits_are_vars(tokenizer: Tokenizer, drawn: list[torch.Tensor], layout: str, which: str, kind: str) -> None:
    """Its notebook's procedure with the same weights; and at token level what is outside is the reconstruction's."""
    stored = np.load(FOLDER / "var_edit.npz")
    top_k, top_p = {"greedy": (1, 0.0), "sample": (20, 0.9)}[kind]
    keep_L = keep_outside(stored[f"mask_{which}"] == 0, SCHEDULE)
    given = Given(vector("tokens"), keep_L)
    images = sample(
        model_of(layout), tokenizer, vector("labels"), cfg=1.5, top_k=top_k, top_p=top_p, given=given, seed=3, rng="var"
    )
    expected = torch.from_numpy(stored[f"edit_{which}_{kind}_{layout}"])
    torch.testing.assert_close(images, expected, atol=PIXEL_ATOL, rtol=0)
    codes_BLZ = torch.cat(drawn, dim=1)
    reconstructed_BLZ = tokenizer.quantizer.codebook.weight[vector("tokens")]
    assert torch.equal(codes_BLZ[:, keep_L], reconstructed_BLZ[:, keep_L])
    assert not torch.equal(codes_BLZ, reconstructed_BLZ)


def test_what_a_mask_keeps() -> None:
    """At the finest scale exactly what lies outside; a coarse token stays where more than half of it does."""
    repaint = np.zeros((8, 8), bool)
    repaint[2:6, 2:6] = True
    keep = [
        part.view(side, side)
        for part, side in zip(SCHEDULE.split(keep_outside(repaint, SCHEDULE)[None]), TINY_SCALES, strict=True)
    ]
    assert keep[0].all()
    assert keep[3].tolist() == (~repaint[::2, ::2]).tolist()
    assert keep[2].flatten().tolist() == [True] * 4 + [False] + [True] * 4


def test_keeping_all_scales_but_the_last_varies_the_finest_tokens_alone(
    tokenizer: Tokenizer, drawn: list[torch.Tensor]
) -> None:
    sample(model_of("adaln"), tokenizer, [1, 2, 3], given=Given(vector("tokens")[:1], keep_scales(3, SCHEDULE)))
    codes_BLZ, first_LZ = torch.cat(drawn, dim=1), tokenizer.quantizer.codebook.weight[vector("tokens")[0]]
    end = SCHEDULE.bounds[2][1]
    assert all(torch.equal(codes_LZ[:end], first_LZ[:end]) for codes_LZ in codes_BLZ)
    assert not torch.equal(codes_BLZ[0], codes_BLZ[1])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_edits_do_not_depend_on_the_batch(tokenizer: Tokenizer, batch_size: int) -> None:
    given = Given(vector("tokens")[[0, 1, 1]], keep_scales(2, SCHEDULE))
    whole = sample(model_of("adaln"), tokenizer, [1, 2, 3], given=given)
    parts = sample(model_of("adaln"), tokenizer, [1, 2, 3], given=given, batch_size=batch_size)
    torch.testing.assert_close(parts, whole, atol=PIXEL_ATOL, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keep_outside(np.zeros((4, 5), bool), SCHEDULE), r"mask: expected a square of booleans, .*\(4, 5\)"),
        (lambda: keep_outside(torch.ones(4, 4), SCHEDULE), "mask: expected a square of booleans, got torch.float32"),
        (lambda: keep_outside(np.zeros((4, 4), bool), SCHEDULE), "mask: nothing of it is to change"),
        (lambda: keep_scales(4, SCHEDULE), r"scales to keep: expected 1\.\.3, got 4"),
        (lambda: keep_scales(True, SCHEDULE), r"scales to keep: expected 1\.\.3, got True"),
        (lambda: keep_scales(1.5, SCHEDULE), r"scales to keep: expected 1\.\.3, got 1\.5"),  # type: ignore[arg-type]
    ],
)
def test_bad_masks(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("tokens", "keep", "message"),
    [
        (torch.zeros(3, 30, dtype=torch.int64), torch.ones(30, dtype=torch.bool), r"expected \(1 or 2, 30\)"),
        (torch.zeros(1, 29, dtype=torch.int64), torch.ones(30, dtype=torch.bool), r"expected \(1 or 2, 30\)"),
        (torch.zeros(1, 30), torch.ones(30, dtype=torch.bool), "integer type, got torch.float32"),
        (torch.full((1, 30), 64), torch.ones(30, dtype=torch.bool), r"tokens of 0\.\.63"),
        (torch.zeros(1, 30, dtype=torch.int64), torch.ones(30), "30 booleans of what stays"),
        (torch.zeros(1, 30, dtype=torch.int64), torch.ones(29, dtype=torch.bool), "30 booleans of what stays"),
    ],
)
def test_bad_given_tokens(tokenizer: Tokenizer, tokens: torch.Tensor, keep: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(model_of("adaln"), tokenizer, [1, 2], given=Given(tokens, keep))


def test_tokens_alone_do_not_say_what_stays(tokenizer: Tokenizer) -> None:
    tokens: Any = torch.zeros(1, 30, dtype=torch.int64)
    with pytest.raises(UserError, match=r"given: expected Given\(tokens, keep\) of .*editing, got Tensor"):
        sample(model_of("adaln"), tokenizer, [1], given=tokens)
