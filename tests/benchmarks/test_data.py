"""benchmarks/data.py on sets small enough for a test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mepa_ds.data.shard_set import ShardSet
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


def test_peers_that_are_not_installed_are_left_out(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("streaming", "litdata"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    out = tmp_path / "result.json"
    benchmark.main(benchmark.Options(samples=60, rounds=1, peers=True, directory=tmp_path / "sets", json=out))
    printed = capsys.readouterr().out
    assert "mosaicml-streaming: left out, it is not installed (streaming): pip install mosaicml-streaming" in printed
    assert "litdata: left out, it is not installed (litdata)" in printed
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]] == ["tokens", "tokens + features int8"]
    assert result["versions"] == {}


def test_peers_get_the_samples_of_ours(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark.make_shards(tmp_path, benchmark.Options(samples=60, peers=True))
    sets = [ShardSet(tmp_path / "tokens"), ShardSet(tmp_path / "int8")]
    found = list(load_benchmark("data_peers", monkeypatch).records(sets))
    assert len(found) == 60
    assert {name: getattr(value, "shape", None) for name, value in found[7].items()} == {
        "tokens": (680,), "label": None, "features": (4, 16), "scale": (4,),
    }  # fmt: skip
    assert found[7]["label"] == 7
    codes = np.empty((1, 680), np.uint16)
    sets[0].read_arrays(np.array([7]), "tokens.npy", codes)
    assert (found[7]["tokens"] == codes[0]).all()
