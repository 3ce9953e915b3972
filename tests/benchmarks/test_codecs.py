"""benchmarks/codecs.py on a source small enough for a test."""

from __future__ import annotations

from types import ModuleType

import pytest

from mepa_ds.teachers.patch_pca import PatchPca, PatchPcaConfig
from tests.benchmarks.importing import load_benchmark


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("codecs", monkeypatch)


def test_measures_codecs_and_views(benchmark: ModuleType) -> None:
    digits = benchmark.digit_squares(72, 40)
    teacher = PatchPca.fit(benchmark._batches(digits), PatchPcaConfig(grid_side=8, width=12))
    source = benchmark.Source("digits", digits, teacher, 64)
    result = benchmark.measure(source, benchmark.Options(samples=20, views=2))
    codecs = result["codecs"]
    assert list(codecs) == ["fp16", "int8", "pca6-int8", "pca4-int8", "pca2-int8"]
    assert codecs["fp16"]["mean_cosine_error"] < codecs["int8"]["mean_cosine_error"] < 1e-3
    assert codecs["int8"]["mean_cosine_error"] < codecs["pca6-int8"]["mean_cosine_error"]
    assert codecs["int8"]["bytes_a_sample"] == 64 * (12 + 4)
    assert result["whole_map"]["grid"] == [9, 9]
    assert result["whole_map"]["another_view_mean"] < result["whole_map"]["mean_cosine"] < 1
