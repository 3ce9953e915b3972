"""The one config path: what is refused, and in what words."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mepa_ds.config.base import (
    Section,
    apply_overrides,
    describe,
    dump_yaml,
    load_config,
    parse_yaml,
    read_yaml,
    validate,
)
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.pretrain import LogConfig, PretrainConfig
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.errors import UserError
from mepa_ds.slurm.pipeline import PipelineConfig
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
        ("train.steps=1:30", r"train\.steps: .*valid integer \(given: '1:30'\)"),
        ("train.steps=1e3", r"train\.steps: .*valid integer, such as 1000 \(given: 1000\.0\)"),
        ("train.steps=true", r"train\.steps: .*valid integer"),
        ("optim.base_lr=true", r"optim\.base_lr: .*valid number"),
        ("optim.base_lr=.nan", r"optim\.base_lr: .*finite number"),
        ("optim.base_lr=1e999", r"optim\.base_lr: .*finite number"),
        ("parallel.compile=yes", r"parallel\.compile: .*valid boolean, true or false \(given: 'yes'\)"),
        ("guards.time_limit=12:00:00", r"time_limit: a number of minutes; 12:00:00 \(hours:minutes:seconds\) is 720"),
        ("guards.stop_before_end='1-12'", r"stop_before_end: a number of minutes; 1-12 \(days:hours\) is 2160"),
        ("guards.hang_timeout=8:00", r"hang_timeout: a number of seconds; 8:00 \(minutes:seconds\) is 480"),
        ("log.wandb_project=0100", r"wandb_project: .*valid string; put text in quotes \(given: 100\)"),
        ("log.wandb_project='a: b'", None),
        ("log.wandb_project=a: b", r"wandb_project: .*valid string; put text in quotes"),
        ("output_dir=2024", r"output_dir: .*valid string; put text in quotes \(given: 2024\)"),
        ("output_dir=~", r"output_dir: .*valid string; null is none, and neither is ~ alone \(given: None\)"),
        ("output_dir=''", r"output_dir: an empty path"),
        ("data.tokens=$MEPA_TEST_UNSET/x", r"data\.tokens: .*the variable \$MEPA_TEST_UNSET is not set here"),
        ("tokenizer=~no-such-user-here/x", r"tokenizer: .*no home directory of ~no-such-user-here"),
        ("data.teacher={name: a, weights: ''}", r"data\.teacher\.weights: an empty path"),
        ("model.moe={router: expert_choice, bias_rate: 0.1}", r"router expert_choice balances by itself: leave capac"),
        ("model.moe={top_k: 1, renormalize: true}", r"renormalize with top_k 1 makes every weight 1"),
        ("model.moe.every=3", r"moe\.every \(3\) exceeds depth \(2\): no block would be MoE"),
        ("objective.alignment.scales=[]", r"scales must name at least one scale"),
        ("data.images=x", r"data: give one of tokens .* and images"),
        (
            "data={images: x, features: y}",
            r"data\.features: belong to data\.tokens; with data\.images set data\.teacher",
        ),
        (
            "data.teacher={name: a, weights: b}",
            r"data\.teacher: runs on data\.images; with data\.tokens set data\.features",
        ),
        (
            "parallel={compile: true, activation_checkpointing: blocks}",
            r"compile and activation_checkpointing \(blocks\) exclude each other",
        ),
        (
            "log={checkpoint_every: 10, keep_every: 25}",
            r"keep_every \(25\) must be a multiple of checkpoint_every \(10\)",
        ),
    ],
)
def test_a_faulty_recipe_names_key_and_remedy(override: str, message: str | None) -> None:
    if message is None:
        config_with(override)
        return
    with pytest.raises(UserError, match=message):
        config_with(override)


def test_paths_of_every_section_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one type: a section with a plain Path would take ~ literally."""
    monkeypatch.setenv("HOME", "/home/me")
    paths = ("output_dir=~/x", "data.tokens=$HOME/t", "tokenizer='${HOME}/v'", "parallel.deepspeed=zero.json")
    config = config_with(*paths)
    assert (config.output_dir, config.data.tokens) == (Path("/home/me/x"), Path("/home/me/t"))
    assert (config.tokenizer, config.parallel.deepspeed) == (Path("/home/me/v"), Path("zero.json"))
    assert "output_dir: /home/me/x\n" in dump_yaml(config)
    online = config_with("data={images: ~/i, teacher: {name: vit, weights: ~/w}}", "objective.alignment.weight=1")
    assert online.data.teacher is not None
    assert online.data.teacher.weights == "/home/me/w"
    sections = all_sections(Section)
    assert {PretrainConfig, TokenizerTrainingConfig, PipelineConfig} <= sections
    for section in sections:
        for name, hint in typing.get_type_hints(section, include_extras=True).items():
            assert not any(part is Path for part in parts_of(hint)), f"{section.__name__}.{name} is a plain Path"


def all_sections(base: type[Section]) -> set[type[Section]]:
    return {found for section in base.__subclasses__() for found in ({section} | all_sections(section))}


def parts_of(hint: Any) -> Iterator[Any]:
    """The types in a hint, but for those that Annotated has given a validator."""
    if typing.get_origin(hint) is Annotated:
        return
    yield hint
    for argument in typing.get_args(hint):
        yield from parts_of(argument)


def test_every_fault_is_listed_at_once() -> None:
    with pytest.raises(UserError, match=r"(?s)model\.dept.*train\.global_batch"):
        config_with("model.dept=3", "train.global_batch=0")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("log.wandb_project=a #1", r"'#1' would be a comment; put the value in quotes"),
        ("log.wandb_project=#1", r"'#1' would be a comment"),
        ("train.steps=", r"there is no value; key=null turns something off"),
        ("train.steps=&x", r"there is no value"),
        ("train.steps=---", r"there is no value"),
        ("log.wandb_project=[a", r"not valid YAML"),
        ("optim.freeze=[*]", r"(?s)not valid YAML: .*; a text that begins with \* stands in quotes, such as"),
        ("optim.freeze=[*bias]", r"(?s)not valid YAML: .*; a text that begins with \* stands in quotes, such as"),
    ],
)
def test_an_override_is_taken_whole_or_not_at_all(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_overrides({}, [override])


def test_quotes_keep_what_yaml_would_read_otherwise() -> None:
    values = apply_overrides({}, ["a='x #1'", 'b="0100"', "c=null", 'd=""', "e=a#1", "f=[1, 2]", "g=x=y"])
    assert values == {"a": "x #1", "b": "0100", "c": None, "d": "", "e": "a#1", "f": [1, 2], "g": "x=y"}


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.channels=48", r"tokenizer: channels must be a multiple of 32 .*, got 48"),
        ("loss.adversarial={channels: 16}", r"loss\.adversarial: channels must be a multiple of 32 .*, got 16"),
        ("codebook={dropout: 0.1, dropout_from: 10}", r"codebook\.dropout_from \(10\) must be below .* scales \(10\)"),
    ],
)
def test_a_faulty_recipe_of_a_tokenizer(override: str, message: str) -> None:
    values = {"output_dir": "x", "data": {"images": "y"}, "train": {"global_batch": 12, "steps": 1}}
    config = validate(TokenizerTrainingConfig, values, "recipe.yaml")
    config.check_world(3)
    with pytest.raises(UserError, match=r"train\.global_batch \(12\) must be a multiple of 8 ranks x .* = 8"):
        config.check_world(8)
    with pytest.raises(UserError, match=message):
        validate(TokenizerTrainingConfig, apply_overrides(values, [override]), "recipe.yaml")


NUMBERS = {
    "1": 1, "-3": -3, "+5": 5, "0100": 100, "08": 8, "0x1F": 31, "0o17": 15, "1_000": 1000, "1_000.5": 1000.5,
    "1.5": 1.5, "5.": 5.0, ".5": 0.5, "5.e-1": 0.5, "1e-4": 1e-4, "1E5": 1e5, "-.inf": -math.inf,
}  # fmt: skip
TEXTS = (
    *("1:30", "12:00:00", "1-12:00:00", "2024-01-01", "2024-01-01 10:00:00", "2024_01_01", "1.0.2", "1_0", "1__000"),
    *("0b1", "0o8", "0x", "5e", "inf", "nan", "yes", "no", "on", "Off", "y", "=", ".", "a#b", "~x", "null2", "a b"),
)


@pytest.mark.parametrize("text", NUMBERS)
def test_what_looks_like_a_number_is_that_number(text: str) -> None:
    value = parse_yaml(text, "test")
    assert (value, type(value)) == (NUMBERS[text], type(NUMBERS[text]))


@pytest.mark.parametrize("text", TEXTS)
def test_all_else_is_text(text: str) -> None:
    """YAML 1.1 has numbers to the base of 60 and 8, dates, and truth values that nobody means."""
    assert parse_yaml(text, "test") == text


def test_truth_values_and_nothing() -> None:
    assert parse_yaml("[true, True, FALSE, null, ~, ]", "test") == [True, True, False, None, None]
    assert math.isnan(parse_yaml(".nan", "test"))


NUMERIC = "0123456789:_.eExob+-"


@settings(deadline=None)
@given(st.tuples(st.sampled_from("0123456789+-"), st.text(NUMERIC, max_size=7), st.sampled_from("0189eb")).map("".join))
def test_no_number_is_read_as_another(text: str) -> None:
    value = parse_yaml(text, "test")
    if not isinstance(value, str):
        plain = text.replace("_", "")
        assert value == (int(plain, 0) if plain[:2] in ("0x", "0o") else float(plain))


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")) | st.text(NUMERIC, max_size=9) | st.text("yYnNoOtTfF~<=", max_size=4))
def test_text_in_a_resolved_recipe_is_read_as_that_text(text: str) -> None:
    assert parse_yaml(dump_yaml(LogConfig(wandb_project=text)), "resolved.yaml")["wandb_project"] == text


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: !!timestamp 2024-01-01", "a: !!int x", "a: !!binary aGk=", "a: <<"])
def test_what_no_recipe_holds_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"recipe: not valid YAML"):
        parse_yaml(text, "recipe")


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
