"""The one config path: what is refused, and in what words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mepa_ds.config.base import apply_overrides, describe, dump_yaml, load_config, parse_yaml, read_yaml, validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from tests.tiny_run import ROOT, recipe_values

RECIPES = sorted(ROOT.glob("recipes/*.yaml"))


def config_with(*overrides: str) -> PretrainConfig:
    return validate(PretrainConfig, apply_overrides(recipe_values(Path("folder")), overrides), "recipe.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dept=3", r"model\.dept: unknown key; did you mean 'depth'\?"),
        ("modle.depth=3", r"modle: unknown key; did you mean 'model'\?"),
        ("model.depth='3'", r"model\.depth: .*valid integer \(given: '3'\)"),
        ("model.depth=2.5", r"model\.depth: .*valid integer"),
        ("optim.base_lr=fast", r"optim\.base_lr: .*valid number \(given: 'fast'\)"),
        ("model.moe.top_k=9", r"model\.moe: top_k \(9\) must not exceed num_experts \(4\)"),
        ("parallel.ep_size=3", r"parallel\.ep_size \(3\) must divide model\.moe\.num_experts \(4\)"),
        ("train.epochs=3", r"train: give one of epochs, steps and samples"),
        ("data.features=null", r"objective\.alignment needs teacher features"),
        ("objective.alignment.scales=[4]", r"objective\.alignment\.scales: \[4\] are 1-based"),
        ("objective.alignment.block=2", r"objective\.alignment\.block: 2 is 0-based"),
        ("model.scales=[3,2,1]", r"sides must grow"),
        ("model.preset=vra-d16", r"no preset 'vra-d16'"),
        ("model.num_heads=5", r"width \(32\) must be divisible by num_heads \(5\)"),
        ("optim.base_lr=.inf", r"optim\.base_lr: .*finite number"),
        ("optim.betas=[0.9, 1.0]", r"optim\.betas\.1: .*less than 1"),
        ("parallel.precision=fp8", r"parallel\.precision: .*'bf16', 'fp16' or 'fp32'"),
    ],
)
def test_a_faulty_recipe_names_key_and_remedy(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_with(override)


def test_every_fault_is_listed_at_once() -> None:
    with pytest.raises(UserError, match=r"(?s)model\.dept.*train\.global_batch"):
        config_with("model.dept=3", "train.global_batch=0")


@pytest.mark.parametrize("override", ["model", "--model.depth=3", "=3", "model.depth.x=3"])
def test_a_malformed_override_says_the_form(override: str) -> None:
    with pytest.raises(UserError):
        config_with(override)


@pytest.mark.parametrize(
    ("world_size", "message"),
    [(3, r"parallel\.ep_size \(2\) must divide the number of ranks \(3\)"), (6, r"train\.global_batch \(8\)")],
)
def test_a_world_that_does_not_fit(world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_with("parallel.ep_size=2").check_world(world_size)


def test_numbers_are_read_as_everybody_means_them() -> None:
    read = parse_yaml("[1, 1e-4, 1.5, 5.e-1, .5, 0x10, -3, true, 1.0.2, 1_000]", "test")
    assert read == [1, 1e-4, 1.5, 0.5, 0.5, 16, -3, True, "1.0.2", 1000]
    assert [type(item) for item in read[:3]] == [int, float, float]


def test_yaml_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(UserError, match="cannot read the recipe: No such file"):
        read_yaml(path)
    path.write_text("model: [1, 2")
    with pytest.raises(UserError, match=r"recipe\.yaml: not valid YAML"):
        read_yaml(path)
    path.write_text("- 1")
    with pytest.raises(UserError, match="expected a mapping"):
        read_yaml(path)
    path.write_bytes("# Gr\xf6\xdfe\nseed: 1".encode("latin-1"))
    with pytest.raises(UserError, match=r"recipe\.yaml: cannot read the recipe: it is no UTF-8 text"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["train: {steps: 1}\ndata: {}\ntrain: {epochs: 2}", "train:\n  steps: 1\n  steps: 2"])
def test_a_key_that_is_given_twice_is_no_yaml(text: str) -> None:
    with pytest.raises(UserError, match=r"recipe: not valid YAML: '(train|steps)' is given twice\s+in .*, line 3"):
        parse_yaml(text, "recipe")


def test_merged_mappings_may_have_the_same_keys() -> None:
    text = "a: &a {x: 1, y: 2}\nouter:\n  inner: &b\n    <<: *a\n    x: 3\nc:\n  <<: *b\n  z: 5\nd: {<<: *a, y: 0}"
    data = parse_yaml(text, "test")
    assert data == yaml.safe_load(text)
    assert data["outer"]["inner"] == {"x": 3, "y": 2}
    assert data["d"] == {"x": 1, "y": 0}
    assert parse_yaml("", "test") is None


def test_the_resolved_config_is_a_recipe_again(tmp_path: Path) -> None:
    config = config_with("model.preset=mepa-d16-iso", "model.depth=2", "optim.base_lr=1e-4")
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(PretrainConfig, path) == config


def test_presets_fill_in_what_is_not_given() -> None:
    config = validate(ModelConfig, {"preset": "mepa-d16-iso", "num_classes": 10, "moe": {"top_k": 1}}, "model")
    assert (config.depth, config.C, config.H, config.num_classes) == (16, 1024, 16, 10)
    assert config.moe is not None
    assert (config.moe.top_k, config.moe.num_experts, config.expert_hidden) == (1, 8, 1344)
    assert validate(ModelConfig, {"preset": "var-d36-512"}, "model").shared_adaln


def test_help_names_every_key() -> None:
    text = "\n".join(describe(PretrainConfig))
    for key in ("output_dir", "model.moe.top_k", "objective.alignment.scales", "parallel.ep_size", "log.every"):
        assert f"  {key}  " in text


@pytest.mark.parametrize("path", [p for p in RECIPES if not p.name.startswith("tokenizer")], ids=lambda p: p.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    load_config(PretrainConfig, path)
