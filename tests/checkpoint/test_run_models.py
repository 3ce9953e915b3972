"""Which files a run's recipe means, wherever the command is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from mepa_ds.checkpoint.run_models import RunModel
from mepa_ds.config.base import validate
from mepa_ds.config.pretrain import PretrainConfig
from tests.tiny_run import recipe_values


def opened(run: Path, output_dir: str) -> RunModel:
    values = {**recipe_values(Path("data")), "output_dir": output_dir, "tokenizer": "runs/tokenizer"}
    return RunModel(run / "best", run, validate(PretrainConfig, values, "recipe"))


def test_another_projects_tokenizer_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projects have the same paths within. A model drawn with another tokenizer gives noise, without an error."""
    for name in ("here", "there"):
        (tmp_path / name / "runs/tokenizer").mkdir(parents=True)
        (tmp_path / name / "runs/pretrain").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tokenizer = Path("runs/tokenizer")
    assert opened(Path("runs/pretrain"), "runs/pretrain").tokenizer() == tokenizer
    for run in (Path("../there/runs/pretrain"), tmp_path / "there/runs/pretrain"):
        assert opened(run, "./runs/pretrain/").tokenizer() == tmp_path / "there/runs/tokenizer"
    # A run that was moved: as its recipe is written, from here or from above.
    (tmp_path / "there/runs/pretrain").rename(tmp_path / "there/renamed")
    assert opened(tmp_path / "there/renamed", "runs/pretrain").tokenizer() == tokenizer
    monkeypatch.chdir(tmp_path)
    assert opened(tmp_path / "there/renamed", "runs/pretrain").tokenizer() == tmp_path / "there/runs/tokenizer"
    assert opened(tmp_path / "there/renamed", "../x").tokenizer() == tmp_path / "there/runs/tokenizer"
