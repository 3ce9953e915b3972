"""A project with one finished run, made without training: a tiny random model whose classes have names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.models.transformer import NextScaleTransformer
from tests.tiny_run import CLASSES, make_tokenizer, recipe_values

NAMES = ("T-shirt/top", "tench, Tinca tinca", "<b onclick='x'>Élan</b> & co")


def make_project(folder: Path, names: Sequence[str] = NAMES, num_classes: int = CLASSES) -> Path:
    """`<folder>/runs/pretrain` and `<folder>/runs/tokenizer`, as `mepa init` has them; returns the run.

    The recipe's paths are relative to `folder`.
    """
    run = folder / "runs" / "pretrain"
    make_tokenizer(folder / "runs" / "tokenizer")
    (folder / "runs" / "tokenizer" / "metrics.jsonl").touch()
    its_recipe = {"output_dir": "runs/tokenizer", "tokenizer": {"scales": [1, 2]}}  # a section, not a path
    (folder / "runs" / "tokenizer" / "resolved.yaml").write_text(yaml.safe_dump(its_recipe))
    values = recipe_values(Path("data"))
    values["model"]["num_classes"] = num_classes
    recipe = {**values, "output_dir": "runs/pretrain", "tokenizer": "runs/tokenizer"}
    torch.manual_seed(1)
    model = NextScaleTransformer(validate(ModelConfig, recipe["model"], "model"))
    model.class_names = tuple(names)
    for name, step in (("last", 20), ("best", 10)):
        model.save_pretrained(run / name)
        (run / name / "training.json").write_text(json.dumps({"step": step}))
    (run / "metrics.jsonl").touch()
    (run / "resolved.yaml").write_text(yaml.safe_dump(recipe))
    return run
