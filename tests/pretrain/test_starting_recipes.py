"""The recipes that start from other weights do so: VAR's file with classes of one's own, and 256 px for 512 px."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.models.adapting.scales import resampled
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.models.var_checkpoint import name_in_var
from mepa_ds.planning.plan import Machine, plan_run
from mepa_ds.scales import ScaleSchedule
from tests.tiny_run import CLASSES, CODE_WIDTH, CODEBOOK, ROOT, SCALES, launch, make_run
from tests.var_fixtures import key_tables

OWN, LARGER = ROOT / "recipes/finetune_own.yaml", ROOT / "recipes/mepa_d16_512.yaml"
SIZES = {"width": 32, "num_heads": 2, "codebook_size": CODEBOOK, "code_width": CODE_WIDTH}
OTHER_SCALES = (1, 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starting")
    make_run(folder)
    return folder


def train(folder: Path, recipe: Path, *settings: str) -> str:
    """Four steps of a tiny model on tiny data; all other keys are the recipe's. Returns what was said."""
    sizes = {"depth": 2, "num_classes": CLASSES, "scales": list(SCALES), **SIZES}
    paths = {
        "output_dir": folder / recipe.stem,
        "tokenizer": folder / "tokenizer",
        "data.tokens": folder / "train.tokens",
    }
    paths["data.heldout_tokens"] = folder / "heldout.tokens"
    words = [f"model.{key}={value}" for key, value in sizes.items()] + [f"{key}={path}" for key, path in paths.items()]
    words += ["data.num_workers=0", "parallel.precision=fp32", "train.global_batch=8", "train.accumulation=2"]
    words += ["train.epochs=null", "train.steps=4", "log.every=1", "log.evaluate_every=4", "log.checkpoint_every=4"]
    run = launch([str(recipe), *words, *settings])
    assert run.returncode == 0, run.stderr
    return run.stderr


def moved(model: NextScaleTransformer, source: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each weight is from its source, as a share of its norm. Drawn anew, it would be as far as its norm."""
    return {
        name: float((tensor - source[name]).norm() / source[name].norm().clamp_min(1e-3))
        for name, tensor in model.state_dict().items()
        if source[name].shape == tensor.shape
    }


def test_own_classes_start_from_vars_file(folder: Path) -> None:
    source = NextScaleTransformer.from_preset("var-d2", num_classes=7, scales=SCALES, **SIZES).state_dict()
    source = {name: tensor + 0.1 for name, tensor in source.items()}
    torch.save({name_in_var(name): tensor for name, tensor in source.items()}, folder / "var.pth")
    said = train(folder, OWN, f"init_weights={folder}/var.pth", "log.sample_every=null")
    assert "var.pth knows 7 classes, model.num_classes is 3: embeddings of the classes start anew" in said
    for kind in ("last", "last_ema"):
        model = NextScaleTransformer.load(folder / OWN.stem / kind)
        found = moved(model, source)
        assert len(found) == len(source) - 1
        assert max(found.values()) < 0.01
        assert torch.allclose(model.class_embed.weight[-1], source["class_embed.weight"][-1], atol=1e-3)


def test_512_px_start_from_256_px(folder: Path) -> None:
    source = NextScaleTransformer.from_preset("mepa-d2", num_classes=CLASSES, scales=OTHER_SCALES, **SIZES)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
    source.save_pretrained(folder / "run256/best")
    guidance = ["objective.alignment.scales=[2,3]", f"data.features={folder}/train.features"]
    said = train(folder, LARGER, f"init_weights={folder}/run256/best", "parallel.ep_size=1", *guidance)
    assert "was trained with scales [1, 2, 4]: embeddings of positions and scales are resampled" in said
    state = source.state_dict()
    state |= resampled(state, ScaleSchedule.of(OTHER_SCALES), ScaleSchedule.of(SCALES))
    found = moved(NextScaleTransformer.load(folder / LARGER.stem / "last"), state)
    assert len(found) == len(state)
    assert max(found.values()) < 0.01


def test_the_model_of_own_images_is_that_of_vars_file() -> None:
    config = load_config(PretrainConfig, OWN)
    with torch.device("meta"):
        model = NextScaleTransformer(config.model)
    official = key_tables()["var_d16"]
    shapes = {name_in_var(name): list(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: official[name] for name in shapes if name != "class_emb.weight"} == {
        name: shape for name, shape in shapes.items() if name != "class_emb.weight"
    }


@pytest.mark.parametrize(
    ("recipe", "ranks", "memory", "images"),
    [(OWN, 1, 24e9, 3000), pytest.param(LARGER, 8, 80e9, 1_281_167, marks=pytest.mark.slow)],
)
def test_they_fit_where_they_say(recipe: Path, ranks: int, memory: float, images: int) -> None:
    plan = plan_run(load_config(PretrainConfig, recipe), Machine(ranks, is_gpu=True, memory=memory, process=0), images)
    assert plan.problems == []
    assert plan.peak < 0.85 * memory, "the allocator and NCCL need some too"
