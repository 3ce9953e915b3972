"""benchmarks/data.py on sets small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from mepa_ds.errors import UserError
from tests.benchmarks.importing import load_benchmark


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_benchmark("data", monkeypatch)
    small = {"NUM_PATCHES": 4, "WIDTH": 16, "BATCH": 6, "CODECS": ("int8", "pca8-int8"), "IMAGENET_SHARDS": 40}
    for name, value in {**small, "SHARD_SAMPLES": 20, "GLOBAL_BATCH": 16, "MANY_TOKENS": 2, "MANY_FEATURES": 1}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_every_way_is_measured(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    benchmark.main(benchmark.Options(samples=60, images=12, rounds=1, directory=tmp_path / "sets", json=out))
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]] == [
        "tokens",
        "tokens + features int8",
        "tokens + features pca8-int8",
        "tokens, 40 shards",
        "tokens + features int8, 40 shards",
        "images, JPEG 500 x 375 to 256",
    ]
    assert {"cat", "webdataset", "loader"} <= result["rows"][0]["samples_per_second"].keys()
    assert {"loader_1_processes", "loader_2_processes"} <= result["rows"][-1]["samples_per_second"].keys()
    quality = result["shuffle_quality_by_window"]
    assert quality["4"]["shards_in_batch"] < quality["8"]["shards_in_batch"] < quality["32"]["shards_in_batch"] < 1.1
    assert "JPEG images/s" in capsys.readouterr().out
    with pytest.raises(UserError, match="num 60 there, 90 now"):
        benchmark.make_shards(tmp_path / "sets", benchmark.Options(samples=90, images=12))
