"""The shipped recipes are valid, and the ImageNet one is VAR's architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from mepa_ds.config.base import load_config
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from tests.tiny_run import ROOT

RECIPES = sorted((ROOT / "recipes").glob("tokenizer_*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path) -> None:
    config = load_config(TokenizerTrainingConfig, path)
    if "imagenet256" in path.stem:
        assert config.tokenizer == TokenizerConfig()
        assert config.optim.base_lr * config.train.global_batch / 256 == pytest.approx(3e-5)
        assert config.train.num_steps(1_281_167) == 250_228
