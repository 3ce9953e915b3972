"""A tokenizer on disk: a directory of ours or a file of VAR's, for a whole run; the example recipe and its sets."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
import yaml

from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data_tools.precompute import _name_of, default_directory
from mepa_ds.errors import UserError
from mepa_ds.slurm.pipeline import PipelineConfig
from mepa_ds.tokenizer import MultiScaleQuantizer, Tokenizer
from mepa_ds.tokenizer.tokenizer import identity_of
from mepa_ds.tokenizer.var_keys import names_in
from tests.ranks import finish
from tests.tiny_run import ROOT, SCALES, losses, make_run
from tests.var_fixtures import TINY_SCALES, fixture_state, vector


def save_as_var(directory: Path, path: Path) -> None:
    """A tokenizer's weights under VAR's names."""
    name_in_var = names_in(fixture_state("tiny_vae"))
    torch.save({name_in_var(name): tensor for name, tensor in Tokenizer.load(directory).state_dict().items()}, path)


@pytest.mark.processes
def test_a_run_from_a_file_of_vars_tokenizer(tmp_path: Path) -> None:
    """The same weights from a directory and from a .pth have one identity and make the same run, with its samples."""
    settings = ["train.steps=2", "log.sample_every=2", "log.checkpoint_every=2", "log.evaluate_every=2"]
    recipe = make_run(tmp_path, *settings)
    save_as_var(tmp_path / "tokenizer", tmp_path / "vae.pth")
    assert identity_of(tmp_path / "vae.pth", SCALES) == identity_of(tmp_path / "tokenizer")
    for name in ("tokenizer", "vae.pth"):
        words = [str(recipe), f"tokenizer={tmp_path / name}", f"output_dir={tmp_path / 'of' / name}"]
        finish(words, 1, tmp_path / f"{name}.log")
    assert losses(tmp_path / "of" / "vae.pth") == losses(tmp_path / "of" / "tokenizer")
    grids = [tmp_path / "of" / name / "samples" / "step_00000002.png" for name in ("tokenizer", "vae.pth")]
    assert grids[0].read_bytes() == grids[1].read_bytes()


def test_the_quantizer_alone(tmp_path: Path) -> None:
    torch.save(fixture_state("tiny_vae"), tmp_path / "vae.pth")
    Tokenizer.open(tmp_path / "vae.pth", TINY_SCALES).save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "vae.pth", tmp_path / "saved"):
        quantizer = MultiScaleQuantizer.load(path, TINY_SCALES)
        torch.testing.assert_close(
            quantizer.inputs_from_tokens(vector("tokens")), vector("teacher_input"), rtol=0, atol=1e-5
        )
        other = MultiScaleQuantizer.load(path, (1, 2, 4))
        assert other.schedule.sides == (1, 2, 4)
        assert torch.equal(other.codebook.weight, quantizer.codebook.weight)


def test_what_is_not_there(tmp_path: Path) -> None:
    for load in (Tokenizer.open, MultiScaleQuantizer.load):
        with pytest.raises(UserError, match=r"nowhere: cannot read the weights: No such file"):
            load(tmp_path / "nowhere")
        with pytest.raises(UserError, match=r"no config\.json here"):
            load(tmp_path)


def test_the_example_recipe_reads_what_the_pipelines_commands_make() -> None:
    pipeline = load_config(PipelineConfig, ROOT / "slurm" / "pipeline_imagenet256.yaml")
    config = load_config(PretrainConfig, ROOT / pipeline.pretrain.recipe)
    assert pipeline.precompute is not None
    made, sides = {}, {}
    for command in pipeline.precompute.commands:
        kind, images, *options = shlex.split(command)
        values = dict(zip(options[::2], options[1::2], strict=True))
        name = _name_of(Path(values["--tokenizer"])) if kind == "tokens" else values["--teacher"]
        made[kind, Path(images).name] = default_directory(ROOT / images, kind, name)
        sides[kind] = values.get("--image-side")
        if kind == "tokens":
            assert Path(values["--tokenizer"]) == config.tokenizer
    assert config.data.tokens is not None
    assert made["tokens", "train"] == ROOT / config.data.tokens
    assert config.data.features is not None
    assert made["features", "train"] == ROOT / config.data.features
    assert config.data.heldout_tokens is not None
    assert made["tokens", "val"] == ROOT / config.data.heldout_tokens
    # Both sets show the same square: the tokens' side is their tokenizer's, 256 for VAR's.
    assert sides == {"tokens": None, "features": "256"}
    shards = yaml.safe_load((ROOT / "slurm" / "pipeline_imagenet256.yaml").read_text())["shards"]["commands"]
    # 288 is 1.125 x 256: VAR's validation crop, for both sets of images.
    assert all("--image-side 288" in command for command in shards)
