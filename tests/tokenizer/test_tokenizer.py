"""The quantizer against a naive reference and its own identities; saving and loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.errors import UserError
from mepa_ds.tokenizer import MultiScaleQuantizer, Tokenizer
from mepa_ds.tokenizer.tokenizer import identity_of

SCHEDULES = st.lists(st.integers(1, 7), min_size=1, max_size=5, unique=True).map(lambda sides: tuple(sorted(sides)))


def make_quantizer(scales: tuple[int, ...], num_phi: int, ratio: float = 0.5, seed: int = 0) -> MultiScaleQuantizer:
    torch.manual_seed(seed)
    config = TokenizerConfig(scales=scales, codebook_size=12, code_width=3, num_phi=num_phi, phi_ratio=ratio)
    return MultiScaleQuantizer(config).eval()


def make_tokenizer(**changes: object) -> Tokenizer:
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "scales": (1, 2, 4), "codebook_size": 16, "code_width": 4, "channels": 32, "channel_multipliers": (1, 1),
        "num_res_blocks": 1, **changes,
    }  # fmt: skip
    return Tokenizer(TokenizerConfig.model_validate(sizes)).eval()


def naive_tokens(quantizer: MultiScaleQuantizer, latent_CHW: Tensor) -> list[int]:
    """Algorithm 1 of the paper for one image, token by token, with distances written out."""
    schedule, tokens = quantizer.schedule, []
    residual_CHW = latent_CHW.clone()
    side = schedule.grid_side
    for k, scale_side in enumerate(schedule.sides):
        chosen = torch.zeros(scale_side, scale_side, dtype=torch.int64)
        small_CHW = F.adaptive_avg_pool2d(residual_CHW, scale_side)
        for row in range(scale_side):
            for column in range(scale_side):
                distances = (quantizer.codebook.weight - small_CHW[:, row, column]).square().sum(1)
                chosen[row, column] = distances.argmin()
        tokens += chosen.flatten().tolist()
        up_1CHW = F.interpolate(quantizer.codebook(chosen).permute(2, 0, 1)[None], size=(side, side), mode="bicubic")
        if quantizer.phi:
            S, n = schedule.num_scales, len(quantizer.phi)
            ticks = np.linspace(1 / 3 / n, 1 - 1 / 3 / n, n) if n == 4 else np.linspace(1 / 2 / n, 1 - 1 / 2 / n, n)
            phi: Any = quantizer.phi[int(np.argmin(np.abs(ticks - k / max(S - 1, 1))))]
            conv = F.conv2d(up_1CHW, phi.weight, phi.bias, padding=1)
            up_1CHW = (1 - phi.ratio) * up_1CHW + phi.ratio * conv
        residual_CHW = residual_CHW - up_1CHW[0]
    return tokens


@settings(max_examples=25, deadline=None)
@given(scales=SCHEDULES, num_phi=st.integers(0, 5), seed=st.integers(0, 99))
@torch.no_grad()
def test_tokens_equal_the_naive_algorithm(scales: tuple[int, ...], num_phi: int, seed: int) -> None:
    quantizer = make_quantizer(scales, num_phi, seed=seed)
    latent = torch.randn(2, 3, scales[-1], scales[-1])
    expected = [naive_tokens(quantizer, image) for image in latent]
    assert quantizer.tokens_of(latent).tolist() == expected
    assert quantizer(latent).tokens_BL.tolist() == expected


@settings(max_examples=25, deadline=None)
@given(scales=SCHEDULES, num_phi=st.integers(0, 5), ratio=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 99))
@torch.no_grad()
def test_sums_of_scales_are_inputs_and_decoded_latent(
    scales: tuple[int, ...], num_phi: int, ratio: float, seed: int
) -> None:
    quantizer = make_quantizer(scales, num_phi, ratio, seed)
    schedule = quantizer.schedule
    tokens_BL = torch.randint(12, (2, schedule.num_tokens))
    f_hat, inputs = quantizer.empty_f_hat(2), []
    for k, tokens_Bl in enumerate(schedule.split(tokens_BL)):
        f_hat = quantizer.add_scale(f_hat, tokens_Bl, k)
        if k < schedule.num_scales - 1:
            inputs.append(quantizer.next_input(f_hat, k))
            side = schedule.sides[k + 1]
            torch.testing.assert_close(
                inputs[-1], F.adaptive_avg_pool2d(f_hat, side).flatten(2).transpose(1, 2), rtol=0, atol=1e-6
            )
    torch.testing.assert_close(quantizer.f_hat_of(tokens_BL), f_hat, rtol=0, atol=0)
    teacher = quantizer.inputs_from_tokens(tokens_BL)
    assert teacher.shape == (2, schedule.num_tokens - schedule.lengths[0], 3)
    if inputs:  # enlarged by matrices instead of interpolation, so equal to rounding
        torch.testing.assert_close(teacher, torch.cat(inputs, dim=1), rtol=0, atol=2e-6)


@torch.no_grad()
def test_encoding_what_was_quantised_costs_no_more_than_rounding() -> None:
    """The training pass and the two-step path (tokens, then their latent) agree."""
    quantizer = make_quantizer((1, 2, 3, 5), 4)
    latent = torch.randn(3, 3, 5, 5)
    quantized = quantizer(latent)
    torch.testing.assert_close(quantized.f_hat_BCHW, quantizer.f_hat_of(quantizer.tokens_of(latent)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_other_schedules_use_the_same_weights() -> None:
    """One phi a scale, trained for three scales, serves five: shared by ticks, as VAR does it."""
    three, five = make_quantizer((1, 2, 4), 0), make_quantizer((1, 2, 3, 4, 6), 3)
    assert len(three.phi) == len(five.phi) == 3
    assert three._phi_of_scale == [0, 1, 2]
    assert five._phi_of_scale == [0, 0, 1, 2, 2]


def test_gradients_reach_latent_codes_and_phi_as_vars_loss_says() -> None:
    quantizer = make_quantizer((1, 2, 4), 2)
    latent = torch.randn(2, 3, 4, 4, requires_grad=True)
    quantized = quantizer(latent)
    weights_BCHW = torch.randn(2, 3, 4, 4)
    (straight,) = torch.autograd.grad((quantized.f_hat_BCHW * weights_BCHW).sum(), latent, retain_graph=True)
    torch.testing.assert_close(straight, weights_BCHW, rtol=0, atol=0)
    assert torch.autograd.grad(quantized.codebook_loss, latent, allow_unused=True, retain_graph=True) == (None,)
    for parameter in map(quantizer.get_parameter, ("codebook.weight", "phi.0.weight")):
        (gradient,) = torch.autograd.grad(quantized.codebook_loss, parameter, retain_graph=True)
        assert gradient.abs().sum() > 0
    (pull,) = torch.autograd.grad(quantized.commitment_loss, latent)
    assert pull.abs().sum() > 0
    # mean over scales of the same squared error, seen from either side
    torch.testing.assert_close(quantized.codebook_loss, quantized.commitment_loss)


@torch.no_grad()
def test_quantizer_dropout_stops_samples_early() -> None:
    quantizer = make_quantizer((1, 2, 4), 2)
    latent = torch.randn(3, 3, 4, 4)
    whole, partial = quantizer(latent), quantizer(latent, torch.tensor([3, 2, 1]))
    torch.testing.assert_close(partial.f_hat_BCHW[0], whole.f_hat_BCHW[0])
    f_hat = quantizer.empty_f_hat(3)
    for k, tokens_Bl in enumerate(quantizer.schedule.split(whole.tokens_BL)[:2]):
        f_hat = quantizer.add_scale(f_hat, tokens_Bl, k)
    torch.testing.assert_close(partial.f_hat_BCHW[1], f_hat[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_autocast_does_not_change_tokens_or_inputs() -> None:
    quantizer = make_quantizer((1, 2, 4), 2)
    latent = torch.randn(2, 3, 4, 4)
    tokens = quantizer.tokens_of(latent)
    inputs = quantizer.inputs_from_tokens(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.tokens_of(latent), tokens)
        assert torch.equal(quantizer.inputs_from_tokens(tokens), inputs)


@torch.no_grad()
def test_a_tokenizer_cast_to_bf16() -> None:
    """Its quantizer computes in fp32 with the rounded weights; encoder and decoder in bf16."""
    tokenizer, images = make_tokenizer(), torch.rand(2, 3, 8, 8) * 2 - 1
    rounded = make_tokenizer()
    for value in (*rounded.parameters(), *rounded.buffers()):
        value.copy_(value.bfloat16().float())
    tokenizer.to(torch.bfloat16)
    latent = torch.randn(2, 4, 4, 4)
    tokens = tokenizer.quantizer.tokens_of(latent)
    assert torch.equal(tokens, rounded.quantizer.tokens_of(latent))
    assert torch.equal(tokenizer.inputs_from_tokens(tokens), rounded.inputs_from_tokens(tokens))
    assert tokenizer.encode(images).shape == (2, 21)
    decoded = tokenizer.decode(tokens)
    assert decoded.dtype == torch.bfloat16
    torch.testing.assert_close(decoded.float(), rounded.decode(tokens), rtol=0, atol=0.1)


PRECISIONS: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]


@pytest.fixture(params=["default", "older switch", "newer switch"])
def fast_products(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a user may have set: nothing (TF32 convolutions), or also TF32 matrix products, in torch's two ways."""
    before = [kind.fp32_precision for kind in PRECISIONS]
    if request.param == "older switch":
        torch.set_float32_matmul_precision("high")
    elif request.param == "newer switch":
        PRECISIONS[1].fp32_precision = "tf32"
    yield
    if request.param == "older switch":
        torch.set_float32_matmul_precision("highest")
    for kind, precision in zip(PRECISIONS, before, strict=True):
        kind.fp32_precision = precision


@pytest.mark.usefixtures("fast_products")
def test_what_decides_tokens_and_inputs_is_not_tf32() -> None:
    """CPUs have no TF32: the test sees the switches that a GPU obeys, not its products."""
    tokenizer, images = make_tokenizer(), torch.zeros(1, 3, 8, 8)
    users, seen = [kind.fp32_precision for kind in PRECISIONS], []
    assert users[0] == "tf32"
    for layer in (tokenizer.encoder.conv_in, tokenizer.to_latent, *tokenizer.quantizer.phi):
        layer.register_forward_pre_hook(lambda *_: seen.append([kind.fp32_precision for kind in PRECISIONS]))
    tokens_BL = tokenizer.encode(images)
    tokenizer.inputs_from_tokens(tokens_BL)
    tokenizer.quantizer.f_hat_of(tokens_BL)
    assert seen == [["ieee", "ieee"]] * (2 + 3 + 2 + 3)
    assert [kind.fp32_precision for kind in PRECISIONS] == users
    seen.clear()
    tokenizer.quantizer(tokenizer.latent(images))  # training is as fast as the user lets it be
    assert seen == [users] * (2 + 3)


def test_tokens_do_not_depend_on_the_callers_autocast() -> None:
    tokenizer, images = make_tokenizer(), torch.rand(16, 3, 8, 8) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = tokenizer.encode(images)
        latent = tokenizer.latent(images)
    assert latent.dtype == torch.bfloat16  # training's own latent is autocast
    assert torch.equal(in_autocast, tokenizer.encode(images))


@pytest.mark.parametrize(
    ("tokens_BL", "message"),
    [
        (torch.full((1, 21), 16), r"tokens: expected 0\.\.15, the codebook's, got 16"),
        (torch.full((1, 21), -1), r"tokens: expected 0\.\.15, the codebook's, got -1"),
        (torch.zeros(1, 21), "tokens: expected integers such as int64, got float32"),
        (torch.zeros(21, dtype=torch.int64), r"tokens have shape \(21,\)"),
    ],
)
def test_bad_tokens(tokens_BL: Tensor, message: str) -> None:
    tokenizer = make_tokenizer()
    for function in (tokenizer.decode, tokenizer.inputs_from_tokens, tokenizer.quantizer.f_hat_of):
        with pytest.raises(UserError, match=message):
            function(tokens_BL)


@pytest.mark.parametrize(
    ("images_B3HW", "message"),
    [
        (torch.zeros(8), r"images have shape \(8,\), expected \(batch, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"images have shape \(3, 8, 8\), expected \(batch, 3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), r"images have shape \(1, 1, 8, 8\), expected \(batch, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"got uint8; for 0\.\.255 give images\.float\(\) / 127\.5 - 1"),
    ],
)
def test_bad_images(images_B3HW: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_tokenizer().encode(images_B3HW)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": False, "num_phi": 0},
        {"channel_multipliers": (1, 2, 2), "scales": (1, 3), "num_phi": 1},
        {"num_res_blocks": 2, "phi_ratio": 0.0, "scales": (2,)},
    ],
)
def test_save_and_load(tmp_path: Path, changes: dict[str, object]) -> None:
    tokenizer = make_tokenizer(**changes)
    side = tokenizer.config.image_side
    images = torch.rand(2, 3, side, side) * 2 - 1
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, tokenizer.schedule.num_tokens)
    assert tokens.dtype == torch.int64
    reconstruction = tokenizer.decode(tokens)
    assert reconstruction.shape == images.shape
    assert reconstruction.abs().max() <= 1
    tokenizer.save_pretrained(tmp_path, max_shard_bytes=20_000)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.config == tokenizer.config
    assert loaded.identity == tokenizer.identity == identity_of(tmp_path)
    assert torch.equal(loaded.encode(images), tokens)
    torch.testing.assert_close(loaded.decode(tokens), reconstruction, rtol=0, atol=0)
    quantizer = MultiScaleQuantizer.load(tmp_path)
    for dtype in (torch.int64, torch.uint16):  # as encoded, as stored
        assert torch.equal(quantizer.inputs_from_tokens(tokens.to(dtype)), tokenizer.inputs_from_tokens(tokens))


def test_identity_tells_weights_and_scales_apart(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(num_phi=0)
    tokenizer.save_pretrained(tmp_path)
    other_scales = Tokenizer.load(tmp_path, scales=(1, 2, 3, 4))
    assert other_scales.config.num_phi == 3
    assert other_scales.identity != tokenizer.identity
    changed = Tokenizer.load(tmp_path)
    changed.get_parameter("decoder.conv_out.bias").data[0] += 1e-3
    assert changed.identity != tokenizer.identity
    assert Tokenizer.load(tmp_path, scales=(1, 2, 4)).identity == tokenizer.identity
