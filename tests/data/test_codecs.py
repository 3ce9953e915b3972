"""Feature codecs: fidelity, the batched decoder against the single one, and bad input."""

from __future__ import annotations

from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mepa_ds.data.codecs import FEATURES_EXT, SCALE_EXT, FeatureDecoder, PcaBasis, codec_named
from mepa_ds.errors import UserError
from mepa_ds.pca import RunningCovariance


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def vit_like(rng: np.random.Generator, tokens: int = 64, width: int = 384) -> np.ndarray:
    """Features as ViTs give them: correlated channels, a few of them much larger, and tokens of different norms."""
    mixing = rng.normal(size=(48, width)) * np.geomspace(1, 0.05, 48)[:, None]
    features = rng.normal(size=(tokens, 48)) @ mixing + 0.1 * rng.normal(size=(tokens, width))
    features[:, rng.integers(width, size=3)] *= 6
    return (features * np.geomspace(0.1, 30, tokens)[:, None]).astype(np.float32)


def basis_of(features: np.ndarray, components: int) -> PcaBasis:
    covariance = RunningCovariance(features.shape[-1])
    covariance.add(torch.from_numpy(features))
    mean, vectors, _ = covariance.principal_components(components)
    return PcaBasis(mean.numpy(), vectors.numpy())


@given(seed=st.integers(0, 2**32 - 1), width=st.sampled_from([64, 384, 768, 1024]))
@settings(max_examples=40, deadline=None)
def test_int8_mean_cosine_above_0_999(seed: int, width: int) -> None:
    features = vit_like(np.random.default_rng(seed), width=width)
    codec = codec_named("int8")
    assert cosine(codec.decode(codec.encode(features)), features).mean() > 0.999


@given(hnp.arrays(np.float32, (3, 5, 16), elements=st.floats(-1e6, 1e6, width=32)))
@settings(max_examples=100, deadline=None)
def test_int8_error_is_at_most_half_a_step(features: np.ndarray) -> None:
    codec = codec_named("int8")
    stored = codec.encode(features)
    assert stored[FEATURES_EXT].dtype == np.int8
    assert stored[SCALE_EXT].shape == (3, 5)
    step = stored[SCALE_EXT][..., None].astype(np.float64)
    assert (np.abs(codec.decode(stored).astype(np.float64) - features) <= 0.5001 * step + 1e-30).all()


def test_fp16_round_trip() -> None:
    features = vit_like(np.random.default_rng(0))
    codec = codec_named("fp16")
    stored = codec.encode(features)
    assert codec.extensions == tuple(stored) == (FEATURES_EXT,)
    np.testing.assert_array_equal(codec.decode(stored), features.astype(np.float16).astype(np.float32))


def test_pca_keeps_what_its_components_span() -> None:
    features = vit_like(np.random.default_rng(1), tokens=512)
    fidelity = {}
    for components in (8, 32, 128):
        codec = codec_named(f"pca{components}-int8", basis_of(features, components))
        stored = codec.encode(features)
        assert stored[FEATURES_EXT].shape == (512, components) == (512, codec.stored_width(384))
        fidelity[components] = cosine(codec.decode(stored), features).mean()
    assert fidelity[8] < fidelity[32] < fidelity[128]
    assert fidelity[128] > 0.99


@pytest.mark.parametrize("name", ["fp16", "int8", "pca24-int8"])
def test_batched_decoder_equals_the_reference(name: str) -> None:
    batch = np.stack([vit_like(np.random.default_rng(seed), tokens=16, width=48) for seed in range(4)])
    codec = codec_named(name, basis_of(batch.reshape(-1, 48), 24) if name.startswith("pca") else None)
    samples = [codec.encode(features) for features in batch]
    expected = np.stack([codec.decode(sample) for sample in samples])
    stacked = [torch.from_numpy(np.stack([sample[ext] for sample in samples])) for ext in codec.extensions]
    decoded = FeatureDecoder(codec)(*stacked)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_basis_file_round_trip(tmp_path: Path) -> None:
    basis = basis_of(vit_like(np.random.default_rng(2)), 16)
    basis.save(tmp_path / "basis.safetensors")
    loaded = PcaBasis.load(tmp_path / "basis.safetensors")
    np.testing.assert_array_equal(loaded.components, basis.components)
    assert loaded.identity == basis.identity
    with pytest.raises(UserError, match="basis is missing"):
        PcaBasis.load(tmp_path / "other.safetensors")


def test_principal_components_against_svd() -> None:
    rows = torch.from_numpy(vit_like(np.random.default_rng(3), tokens=300, width=40)).double()
    covariance = RunningCovariance(40)
    for block in rows.split(70):
        covariance.add(block)
    mean, components, variances = covariance.principal_components(5)
    _, singular, vectors = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close(mean, rows.mean(0).float())
    torch.testing.assert_close(variances, (singular[:5] ** 2 / 300).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close((components.double() * vectors[:5]).sum(1).abs(), torch.ones(5).double())
    assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()


def test_zero_token_stays_zero() -> None:
    codec = codec_named("int8")
    assert (codec.decode(codec.encode(np.zeros((2, 8), np.float32))) == 0).all()


@pytest.mark.parametrize("name", ["int4", "pca-int8", "pca0-int8", "pca256"])
def test_unknown_codec(name: str) -> None:
    with pytest.raises(UserError, match="use fp16, int8 or pca<k>-int8"):
        codec_named(name)


def test_pca_codec_without_its_basis() -> None:
    with pytest.raises(UserError, match="needs a basis of 256 components, got None"):
        codec_named("pca256-int8")


def test_too_many_components() -> None:
    with pytest.raises(UserError, match="20 components asked of 64 vectors of width 16"):
        basis_of(np.ones((64, 16), np.float32), 20)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite(bad: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        codec_named("int8").encode(np.array([[1.0, bad]], np.float32))


def test_features_beyond_fp16() -> None:
    with pytest.raises(UserError, match="--codec int8"):
        codec_named("fp16").encode(np.array([[1.0, 1e5]], np.float32))
