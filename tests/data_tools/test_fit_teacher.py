"""`precompute.py fit-teacher` for the small networks: from images to features, kept on a second start, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import MadeBy
from mepa_ds.data.shards.writer import Manifest, ShardWriter
from mepa_ds.data_tools.precompute import FitTeacher, parse
from mepa_ds.errors import UserError
from tests.data_tools.precompute_fixtures import write_images

SMALL = ("--grid-side", "4", "--pixels-per-cell", "4", "--width", "8", "--steps", "3")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("fit") / "images")


@pytest.mark.parametrize("kind", ["contrastive", "supervised"])
def test_a_network_is_fitted_kept_and_gives_features(images: Path, tmp_path: Path, kind: str, capsys: Any) -> None:
    out = str(tmp_path / "teacher")
    command = ["fit-teacher", kind, str(images), "--out", out, *SMALL]
    parse(command)()
    assert f"{kind} of width 8, fitted on 18 images" in capsys.readouterr().out
    config = json.loads((tmp_path / "teacher/config.json").read_text())
    assert (config["model_type"], config["steps"], config["batch"]) == (kind, 3, 18)
    parse(command)()
    assert "fitted already, kept" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a teacher fitted otherwise"):
        parse([*command, "--steps", "4"])()
    features = ["features", str(images), "--teacher", kind, "--weights", out, "--cls", "--out", str(tmp_path / "set")]
    parse(features)()
    made = ShardSet(tmp_path / "set")
    assert made.index.made_by.name == kind
    assert set(made.read(0)[1]) == {"features.npy", "scale.npy", "cls_token.npy"}


def test_options_and_images_that_do_not_fit(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--window: fit-teacher contrastive has no window"):
        FitTeacher("contrastive", images, tmp_path / "t", window=8)()
    with pytest.raises(UserError, match="--steps: fit-teacher patch-pca has no steps"):
        FitTeacher("patch-pca", images, tmp_path / "t", steps=8)()
    with pytest.raises(UserError, match="pixels_per_cell must be 4, 8 or 16"):
        FitTeacher("supervised", images, tmp_path / "t", pixels_per_cell=6)()
    unlabelled = ShardWriter(
        tmp_path / "none", Manifest(kind="images", shard_names=("a.tar",), classes=(), made_by=MadeBy(name="test"))
    )
    key, members = ShardSet(images).read(0)
    unlabelled.write_shard("a.tar", [(f"{key}{n}", {"png": members["png"]}) for n in range(4)])
    unlabelled.finish()
    with pytest.raises(UserError, match="no labels of at least two classes to learn from"):
        FitTeacher("supervised", tmp_path / "none", tmp_path / "t", grid_side=4, pixels_per_cell=4, steps=2)()
