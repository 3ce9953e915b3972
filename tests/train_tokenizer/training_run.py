"""A tiny training run of a tokenizer: 24 images of 8 x 8 pixels, a recipe, two ways to start it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mepa_ds.config.base import apply_overrides, validate
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.data.shards.index import MadeBy
from mepa_ds.train_tokenizer.loop import train_tokenizer
from mepa_ds.train_tokenizer.trainer import TokenizerTrainer
from tests.ranks import finish
from tests.tiny_run import write_set

SCRIPT = """
import sys
from mepa_ds.command_line import entry
from mepa_ds.cli.train_tokenizer import main
entry.run(lambda: main(sys.argv[1:]))
"""
ADVERSARIAL = "{weight: 0.5, num_layers: 1, channels: 32, lecam: 0.01, start_step: 1}"


class Never:
    """Nobody asks the run to stop. (`StopRequests` would take over the signals of the tests' own process.)"""

    reason = None


def make_images(directory: Path, count: int = 24, seed: int = 0, broken: int | None = None) -> Path:
    """Blobs of a random colour at a random place; sample `broken` is no image."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:8, :8]
    samples = []
    for number in range(count):
        centre, colour = rng.uniform(1, 7, 2), rng.uniform(80, 255, 3)
        blob = np.exp(-((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / 6)
        buffer = io.BytesIO()
        Image.fromarray((blob[..., None] * colour).astype(np.uint8)).save(buffer, "PNG")
        samples.append({"png": b"torn" if number == broken else buffer.getvalue(), "cls": b"0"})
    write_set(directory, "images", MadeBy(name="blobs"), samples)
    return directory


def recipe(folder: Path, *overrides: str) -> dict[str, Any]:
    values = {
        "output_dir": str(folder / "run"),
        "data": {"images": str(folder / "images"), "heldout_images": str(folder / "heldout"), "num_workers": 0},
        "tokenizer": {
            "scales": [1, 2, 4],
            "codebook_size": 16,
            "code_width": 4,
            "channels": 32,
            "channel_multipliers": [1, 1],
            "num_res_blocks": 1,
            "attention": False,
        },
        "codebook": {"revive_every": 2, "revive_below": 0.5, "dropout": 0.3, "dropout_from": 1},
        "optim": {"base_lr": 0.03},
        "train": {"steps": 6, "global_batch": 8},
        "log": {"every": 1, "evaluate_every": 3, "checkpoint_every": 3},
    }
    return apply_overrides(values, overrides)


def make_data(folder: Path) -> None:
    make_images(folder / "images")
    make_images(folder / "heldout", count=7, seed=1)


def config(folder: Path, *overrides: str) -> TokenizerTrainingConfig:
    return validate(TokenizerTrainingConfig, recipe(folder, *overrides), "test")


def train(folder: Path, *overrides: str) -> None:
    """In this process, to the end."""
    assert train_tokenizer(config(folder, *overrides), Never())  # type: ignore[arg-type]


def train_and_kill(folder: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    """Stops before step 5 of a run whose last checkpoint is of step 3."""
    step = TokenizerTrainer.step

    def killed_at_five(self: TokenizerTrainer, batches: Any) -> None:
        if self.step_index == 5:
            raise KeyboardInterrupt
        step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTrainer, "step", killed_at_five)
        with pytest.raises(KeyboardInterrupt):
            train(folder, *settings)


def train_on_ranks(folder: Path, *overrides: str, count: int = 2) -> None:
    """On gloo ranks, to the end."""
    finish([str(write_recipe(folder, *overrides))], count, folder / "ranks.log", "train_tokenizer")


def write_recipe(folder: Path, *overrides: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, *overrides)))
    return path


def write_script(folder: Path) -> Path:
    """A program for a launcher."""
    path = folder / "train_tokenizer.py"
    path.write_text(SCRIPT)
    return path
