"""Feature codecs: fidelity, agreement with references in NumPy, and bad input."""

from __future__ import annotations

from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mepa_ds.data.codecs import FEATURES_EXT, SCALE_EXT, FeatureCodec, FeatureDecoder, PcaBasis, codec_named
from mepa_ds.errors import UserError
from mepa_ds.teachers.pca import RunningCovariance


def mean_cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean())


def decoded(codec: FeatureCodec, stored: dict[str, Tensor]) -> Tensor:
    return FeatureDecoder(codec)(*(stored[ext] for ext in codec.extensions))


def vit_like(seed: int, tokens: int = 64, width: int = 384) -> Tensor:
    """Features as ViTs give them: correlated channels, a few of them much larger, and tokens of different norms."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(48, width)) * np.geomspace(1, 0.05, 48)[:, None]
    features = rng.normal(size=(tokens, 48)) @ mixing + 0.1 * rng.normal(size=(tokens, width))
    features[:, rng.integers(width, size=3)] *= 6
    return torch.from_numpy((features * np.geomspace(0.1, 30, tokens)[:, None]).astype(np.float32))


def basis_of(features: Tensor, components: int) -> PcaBasis:
    covariance = RunningCovariance(features.shape[-1])
    covariance.add(features)
    return PcaBasis(*covariance.principal_components(components)[:2], teacher="0123")


@given(seed=st.integers(0, 2**32 - 1), width=st.sampled_from([64, 384, 768, 1024]))
@settings(max_examples=40, deadline=None)
def test_int8_mean_cosine_above_0_999(seed: int, width: int) -> None:
    features = vit_like(seed, width=width)
    codec = codec_named("int8")
    assert mean_cosine(decoded(codec, codec.encode(features)), features) > 0.999


@given(hnp.arrays(np.float32, (3, 5, 16), elements=st.floats(-1e6, 1e6, width=32)))
@settings(max_examples=100, deadline=None)
def test_int8_against_numpy(features: np.ndarray) -> None:
    """The stored levels are the nearest ones: no value is off by more than half a step of its token."""
    codec = codec_named("int8")
    stored = codec.encode(torch.from_numpy(features))
    levels, scale = stored[FEATURES_EXT].numpy(), stored[SCALE_EXT].numpy()
    assert (levels.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (3, 5))
    np.testing.assert_allclose(scale, np.abs(features).max(-1) / 127, rtol=1e-6)
    expected = levels.astype(np.float64) * scale[..., None]
    assert (np.abs(expected - features) <= 0.5001 * scale[..., None] + 1e-30).all()
    np.testing.assert_allclose(decoded(codec, stored).numpy(), expected, rtol=1e-6)


def test_fp16_round_trip() -> None:
    features = vit_like(0)
    codec = codec_named("fp16")
    stored = codec.encode(features)
    assert codec.extensions == tuple(stored) == (FEATURES_EXT,)
    assert torch.equal(decoded(codec, stored), features.half().float())


def test_pca_keeps_what_its_components_span() -> None:
    features = vit_like(1, tokens=512)
    fidelity = {}
    for components in (8, 32, 128):
        codec = codec_named(f"pca{components}-int8", basis_of(features, components))
        stored = codec.encode(features)
        assert stored[FEATURES_EXT].shape == (512, components)
        fidelity[components] = mean_cosine(decoded(codec, stored), features)
    assert fidelity[8] < fidelity[32] < fidelity[128]
    assert fidelity[128] > 0.99


@pytest.mark.parametrize("name", ["fp16", "int8", "pca24-int8"])
def test_a_batch_is_its_samples(name: str) -> None:
    batch = torch.stack([vit_like(seed, tokens=16, width=48) for seed in range(4)])
    codec = codec_named(name, basis_of(batch.flatten(0, 1), 24) if name.startswith("pca") else None)
    samples = [codec.encode(features) for features in batch]
    batched = decoded(codec, {ext: torch.stack([sample[ext] for sample in samples]) for ext in codec.extensions})
    assert batched.dtype == torch.float32
    torch.testing.assert_close(batched, torch.stack([decoded(codec, sample) for sample in samples]))


def test_basis_file_round_trip(tmp_path: Path) -> None:
    basis = basis_of(vit_like(2), 16)
    basis.save(tmp_path / "basis.safetensors")
    loaded = PcaBasis.load(tmp_path / "basis.safetensors")
    assert torch.equal(loaded.components, basis.components)
    assert loaded.teacher == "0123"
    with pytest.raises(UserError, match="needs a PCA basis of 8 components, got 16"):
        codec_named("pca8-int8", loaded)
    with pytest.raises(UserError, match="PCA basis of the shard set is missing"):
        PcaBasis.load(tmp_path / "other.safetensors")


def test_principal_components_against_svd() -> None:
    rows = vit_like(3, tokens=300, width=40).double()
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
    assert (decoded(codec, codec.encode(torch.zeros(2, 8))) == 0).all()


@pytest.mark.parametrize("name", ["int4", "pca-int8", "pca0-int8", "pca256"])
def test_unknown_codec(name: str) -> None:
    with pytest.raises(UserError, match="use fp16, int8 or pca<k>-int8"):
        codec_named(name)


def test_pca_codec_without_its_basis() -> None:
    with pytest.raises(UserError, match="needs a PCA basis of 256 components, got None"):
        codec_named("pca256-int8")


def test_too_many_components() -> None:
    with pytest.raises(UserError, match="20 components asked of 64 vectors of width 16"):
        basis_of(torch.ones(64, 16), 20)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite(bad: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        codec_named("int8").encode(torch.tensor([[1.0, bad]]))


def test_features_beyond_fp16() -> None:
    with pytest.raises(UserError, match="use the codec int8"):
        codec_named("fp16").encode(torch.tensor([[1.0, 1e5]]))
