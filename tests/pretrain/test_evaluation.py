"""Held-out sets with damaged samples or foreign labels: every rank ends with the message, or leaves them out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mepa_ds.runtime.metrics import read_metrics
from tests.ranks import Ranks, finish
from tests.tiny_run import make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose held-out set of 10 samples has one that is no array."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, "train.steps=2", "log.evaluate_every=2", "log.evaluate_batch=2")
    shutil.copytree(folder / "heldout.tokens", folder / "damaged.tokens")
    shard = folder / "damaged.tokens" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    start = content.find(b"\x93NUMPY", len(content) // 2)
    content[start : start + 6] = b"broken"
    shard.write_bytes(content)
    return folder


def test_a_damaged_sample_ends_the_run_on_all_ranks(folder: Path) -> None:
    arguments = [f"output_dir={folder / 'stop'}", f"data.heldout_tokens={folder / 'damaged.tokens'}"]
    with Ranks([str(folder / "recipe.yaml"), *arguments], 2, folder / "stop.log") as ranks:
        assert ranks.wait() == [2, 2]
    assert "damaged.tokens/shard-000000.tar: sample" in (folder / "stop.log").read_text()


def test_or_is_left_out_and_counted(folder: Path) -> None:
    arguments = [f"output_dir={folder / 'skip'}", f"data.heldout_tokens={folder / 'damaged.tokens'}"]
    finish([str(folder / "recipe.yaml"), *arguments, "data.on_damaged=skip"], 2, folder / "skip.log")
    (heldout,) = [r for r in read_metrics(folder / "skip" / "metrics.jsonl") if r["event"] == "heldout"]
    assert heldout["damaged_samples"] == 1
    assert 0 < heldout["ce"] < 4
