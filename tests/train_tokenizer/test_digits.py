"""The quickstart's tokenizer on real images, cut short: digits of 16 pixels, 100 steps. About 15 s on one core."""

from __future__ import annotations

from pathlib import Path

import pytest

from mepa_ds.config.base import load_config
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.data_tools.build_shards import BuildOptions, Encoding, build
from mepa_ds.data_tools.readers.digits import Digits
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.train_tokenizer.loop import train_tokenizer
from tests.tiny_run import ROOT
from tests.train_tokenizer.training_run import Never


@pytest.mark.slow
def test_quality_and_use_of_the_codes_reach_their_floors(tmp_path: Path) -> None:
    """Floors under what seeds 0 and 1 reach (16.5 and 16.8 dB), above codes that start in the wrong place (15.7)."""
    for split in ("train", "heldout"):
        build(Digits(split, side=16), BuildOptions(tmp_path / split, Encoding(), workers=0))
    settings = [
        f"output_dir={tmp_path / 'run'}", f"data.images={tmp_path / 'train'}",
        f"data.heldout_images={tmp_path / 'heldout'}", "tokenizer.channel_multipliers=[1, 1, 2]", "train.steps=100",
        "log.evaluate_every=50", "log.evaluate_images=100",
    ]  # fmt: skip
    config = load_config(TokenizerTrainingConfig, ROOT / "recipes" / "tokenizer_quickstart.yaml", settings)
    assert train_tokenizer(config, Never())  # type: ignore[arg-type]
    middle, last = (r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["event"] == "heldout")
    assert middle["perplexity"] > 20  # 7 where codes start on the residuals of random ones
    assert middle["codebook_use"] > 0.5
    assert last["psnr"] > 16.0
    assert last["codebook_use"] > 0.65
    assert last["perplexity"] > 25
