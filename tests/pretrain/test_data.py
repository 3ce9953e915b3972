"""What is said of the sets of a run: the same before it is started, as far as they are there, as at the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.cli.pretrain import main
from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.pretrain.data import check_made_sets, open_sets
from tests.tiny_run import make_run, make_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def config_of(folder: Path, *overrides: str) -> PretrainConfig:
    paths = [
        f"data.{key}={folder / name}" for key, name in (("tokens", "train.tokens"), ("features", "train.features"))
    ]
    paths += [f"data.heldout_tokens={folder / 'heldout.tokens'}", f"tokenizer={folder / 'tokenizer'}"]
    return load_config(PretrainConfig, folder / "recipe.yaml", [*paths, *overrides])


def change(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused_alike(config: PretrainConfig, message: str) -> None:
    for check in (check_made_sets, open_sets):
        with pytest.raises(UserError, match=message):
            check(config)


def test_a_validation_set_that_lacks_a_class(folder: Path) -> None:
    change(folder, "train.tokens", classes=["cat", "dog", "fox"])
    change(folder, "heldout.tokens", classes=["cat", "fox"])
    message = (
        r"label 1 is 'dog' in the first and 'fox' in the second; make one of them again .*"
        r"mepa data build has --classes for that"
    )
    refused_alike(config_of(folder), message)
    change(folder, "train.tokens", classes=[])
    refused_alike(
        config_of(folder), r"model\.num_classes: 3, but data\.heldout_tokens .* has 2 classes; set model\.num"
    )


def test_the_dry_run_says_it_first(folder: Path) -> None:
    change(folder, "heldout.tokens", classes=["cat", "fox"])
    with pytest.raises(UserError, match=r"data\.heldout_tokens .* has 2 classes"):
        main([str(folder / "recipe.yaml"), "--dry-run", f"data.heldout_tokens={folder / 'heldout.tokens'}"])


def test_numbers_for_classes_may_end_early(folder: Path) -> None:
    """Readers number classes up to the highest label that they met."""
    change(folder, "heldout.tokens", classes=["0", "1"])
    config = config_of(folder)
    check_made_sets(config)
    open_sets(config)
    change(folder, "train.tokens", classes=["0", "1"])
    refused_alike(config, r"model\.num_classes: 3, but data\.tokens .* has 2 classes")


def test_other_facts_are_said_before_too(folder: Path) -> None:
    refused_alike(config_of(folder, "model.codebook_size=32"), r"model\.codebook_size: 32, but data\.tokens .* has 16")
    make_tokenizer(folder / "other", seed=1)
    refused_alike(config_of(folder, f"tokenizer={folder / 'other'}"), r"data\.tokens: .* was made by tokenizer 'tiny'")
    change(folder, "train.features", kind="images")
    refused_alike(config_of(folder), r"data\.features: .* holds images .*, not features")


def test_what_is_still_to_be_made_is_not_asked_for(folder: Path) -> None:
    """Nor a tokenizer whose training has only begun."""
    for name in ("train.tokens", "train.features", "heldout.tokens"):
        config = config_of(folder)
        check_made_sets(config)
        shutil.rmtree(folder / name)
    (folder / "tokenizer" / "config.json").unlink()
    check_made_sets(config_of(folder))
