"""Runs that start from weights on disk."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from mepa_ds.cli.upcycle import main as upcycle_command
from mepa_ds.config.base import apply_overrides, validate
from mepa_ds.config.model import ModelConfig, MoEConfig
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.engine.deepspeed_config import build, read_knobs
from mepa_ds.engine.starting.initial_weights import load_initial_weights
from mepa_ds.errors import UserError
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.models.upcycling import upcycle
from mepa_ds.models.var_checkpoint import name_in_var
from mepa_ds.runtime.metrics import read_metrics
from tests.ranks import Ranks
from tests.tiny_run import CLASSES, CODE_WIDTH, CODEBOOK, SCALES, make_run, recipe_values


def dense_model(**changes: Any) -> NextScaleTransformer:
    return NextScaleTransformer.from_preset(
        "var-d2",
        **{
            "width": 32,
            "num_heads": 2,
            "num_classes": CLASSES,
            "scales": SCALES,
            "codebook_size": CODEBOOK,
            "code_width": CODE_WIDTH,
            "ffn_ratio": 2.0,
            "head_init": 5.0,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("initial")
    make_run(folder, "train.steps=1", "objective.ce_weight=1.0", "model.ffn_ratio=2.0")
    dense = dense_model()
    dense.save_pretrained(folder / "dense")
    upcycle(dense, MoEConfig(num_experts=4, expert_ratio=2.0)).save_pretrained(folder / "moe")
    return folder


def start(folder: Path, name: str, *settings: str, ranks: int = 1) -> tuple[list[int | None], str]:
    """Every rank's exit status, and what was printed."""
    log = folder / f"{name}.log"
    with Ranks([str(folder / "recipe.yaml"), f"output_dir={folder / name}", *settings], ranks, log) as started:
        return started.wait(), log.read_text()


def first_ce(folder: Path, name: str, weights: str, *settings: str, ranks: int = 1) -> float:
    codes, said = start(folder, name, f"init_weights={folder / weights}", *settings, ranks=ranks)
    assert codes == [0] * ranks, said
    records = read_metrics(folder / name / "metrics.jsonl")
    return next(record["ce"] for record in records if record["event"] == "train")


def test_an_upcycled_run_starts_where_the_dense_model_is(folder: Path) -> None:
    dense = first_ce(folder, "from_dense", "dense", "model.moe=null")
    assert abs(dense - math.log(CODEBOOK)) > 1e-3  # its own weights, not a fresh model's
    sharded = first_ce(folder, "from_moe_ep2", "moe", "parallel.ep_size=2", ranks=2)
    assert sharded == pytest.approx(dense, abs=1e-5)


def test_a_run_starts_from_a_file_of_vars_transformer(folder: Path) -> None:
    state = NextScaleTransformer.load(folder / "dense").state_dict()
    torch.save({name_in_var(name): tensor for name, tensor in state.items()}, folder / "var.pth")
    ours, theirs = (first_ce(folder, f"of_{name}", name, "model.moe=null") for name in ("dense", "var.pth"))
    assert theirs == ours
    codes, said = start(folder, "x", f"init_weights={folder / 'var.pth'}")
    assert codes == [2]
    assert re.search(r"init_weights: .*var\.pth does not fit the recipe's model: it is dense", said)


def test_the_steps_of_loss_free_balancing_come_along(tmp_path: Path) -> None:
    def model() -> NextScaleTransformer:
        moe = {"num_experts": 4, "bias_rate": 0.01}
        return NextScaleTransformer.from_preset("mepa-d2", width=32, num_heads=2, scales=SCALES, code_width=4, moe=moe)

    trained, fresh = model(), model()
    block: Any
    for block in trained.blocks:
        block.ffn.router.bias_steps_E += torch.tensor([3, -1, 0, -2])
    trained.save_pretrained(tmp_path / "trained")
    load_initial_weights(fresh, tmp_path / "trained")
    for block in fresh.blocks:
        assert block.ffn.router.bias_steps_E.tolist() == [3, -1, 0, -2]


def test_loss_free_balancing_does_not_start_from_a_router_that_cannot_tell_experts_apart(tmp_path: Path) -> None:
    moe: dict[str, Any] = {"num_experts": 4, "expert_ratio": 2.0}
    model = upcycle(dense_model(), MoEConfig(**moe))
    model.save_pretrained(tmp_path / "upcycled")
    run = dense_model(moe=moe | {"bias_rate": 0.01})
    with pytest.raises(UserError, match=r"init_weights: .*upcycled: model\.moe\.bias_rate 0\.01: a router fresh from"):
        load_initial_weights(run, tmp_path / "upcycled")
    block: Any
    for block in model.blocks:
        block.ffn.router.gate.weight.data.normal_(std=0.01)  # as training does
    model.save_pretrained(tmp_path / "trained")
    load_initial_weights(run, tmp_path / "trained")


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    codes, said = start(folder, "refused", f"init_weights={folder / 'dense'}")
    assert codes == [2]
    assert re.search(
        r"init_weights: .*dense does not fit the recipe's model: .*\n  mepa upcycle --weights \S*dense ", said
    )


def test_weights_of_other_classes_are_taken_but_for_these(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = dense_model(num_classes=7), dense_model(num_classes=3)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.25)
    drawn_NC = target.class_embed.weight.detach().clone()
    source.save_pretrained(tmp_path / "weights")
    load_initial_weights(target, tmp_path / "weights")
    found = capsys.readouterr().err
    assert re.search(r"weights knows 7 classes, model\.num_classes is 3: embeddings of the classes start anew", found)
    theirs = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name == "class_embed.weight":
            assert torch.equal(parameter[:-1], drawn_NC[:-1])
            assert torch.equal(parameter[-1], theirs[name][-1])
        else:
            assert torch.equal(parameter, theirs[name]), name
    config = json.loads((tmp_path / "weights/config.json").read_text())
    (tmp_path / "weights/config.json").write_text(json.dumps(config | {"num_classes": 6}))
    with pytest.raises(UserError, match=r"init_weights: .*class_embed\.weight: \(8, 32\) in the weights, \(7, 32\) in"):
        load_initial_weights(target, tmp_path / "weights")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scales": (1, 2, 5)}, "model.scales=[1,2,5], and use tokens of these scales"),
        ({"num_heads": 4}, "model.num_heads=4"),
        ({"ffn_ratio": 3.0, "shared_adaln": True}, "model.ffn_ratio=3.0 model.shared_adaln=true"),
        ({"qk_norm": False, "depth": 1}, "model.depth=1 model.qk_norm=false"),
        ({"width": 64, "codebook_size": 32}, "model.width=64 model.codebook_size=32"),
    ],
)
def test_a_refusal_names_settings_with_which_it_starts(tmp_path: Path, changes: dict[str, object], told: str) -> None:
    dense_model(**changes).save_pretrained(tmp_path / "weights")
    with pytest.raises(UserError) as error:
        load_initial_weights(dense_model(), tmp_path / "weights")
    said = str(error.value)
    assert f"To start from these weights, set {told}" in said
    for key, value in changes.items():
        assert f"model.{key}: {list(value) if isinstance(value, tuple) else value} there, " in said
    settings = said[said.index(" set ") + 5 :].split(", and ")[0].split()
    values = apply_overrides({"model": dense_model().config.model_dump(mode="json")}, settings)["model"]
    load_initial_weights(NextScaleTransformer(validate(ModelConfig, values, "test")), tmp_path / "weights")


@pytest.mark.parametrize(
    "moe",
    [
        {"num_experts": 4, "expert_ratio": 2.0},
        {"num_experts": 6, "top_k": 3, "expert_ratio": 4.0, "renormalize": True, "bias_rate": 0.01, "every": 2},
        {"num_experts": 3, "router": "token", "shared_expert": False, "expert_ratio": 1.0},
    ],
)
@pytest.mark.parametrize("foreign", [False, True])
def test_the_command_that_a_refusal_names_makes_the_mixture(
    tmp_path: Path, moe: dict[str, object], foreign: bool
) -> None:
    dense, path = dense_model(qk_norm=not foreign), tmp_path / ("var.pth" if foreign else "dense model")
    if foreign:
        torch.save({name_in_var(name): tensor for name, tensor in dense.state_dict().items()}, path)
    else:
        dense.save_pretrained(path)
    with pytest.raises(UserError, match="it is dense, and the recipe's has experts") as error:
        load_initial_weights(dense_model(qk_norm=not foreign, moe=moe), path)
    _, command, after = str(error.value).split("\n")
    words = [str(tmp_path / "moe") if word == "OUT" else word for word in shlex.split(command)]
    assert words[:2] == ["mepa", "upcycle"]
    upcycle_command(words[2:])
    settings = after.removeprefix("  and set ").split(";")[0].split()
    assert settings[0] == "init_weights=OUT"
    values = apply_overrides({"model": {"moe": moe}}, settings[1:])["model"]["moe"]
    load_initial_weights(dense_model(qk_norm=not foreign, moe=values), tmp_path / "moe")


def test_a_mixture_for_a_dense_run_or_another_mixture(tmp_path: Path) -> None:
    dense_model(moe={"num_experts": 4, "top_k": 1}).save_pretrained(tmp_path / "moe")
    with pytest.raises(UserError, match=r"it has experts, and the recipe's is dense; set model\.moe\.router=stmoe "):
        load_initial_weights(dense_model(), tmp_path / "moe")
    with pytest.raises(UserError, match=r"set model\.moe\.num_experts=4 model\.moe\.top_k=1$"):
        load_initial_weights(dense_model(moe={"num_experts": 6}), tmp_path / "moe")
    dense_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match=r"With model\.moe\.router=expert_choice it cannot be upcycled; use another"):
        load_initial_weights(dense_model(moe={"router": "expert_choice"}), tmp_path / "dense")


def test_heads_that_neither_file_nor_recipe_tell_are_asked_for(tmp_path: Path) -> None:
    """A depth that is the number of heads by default says nothing of a file's heads."""
    state = dense_model(qk_norm=False).state_dict()
    torch.save({name_in_var(name): tensor for name, tensor in state.items()}, tmp_path / "var.pth")
    load_initial_weights(dense_model(qk_norm=False), tmp_path / "var.pth")
    untold = NextScaleTransformer(
        validate(ModelConfig, dense_model(qk_norm=False).config.model_dump(mode="json") | {"num_heads": None}, "test")
    )
    with pytest.raises(UserError, match=r"init_weights: .*var\.pth: num_heads: .*model\.num_heads in a recipe"):
        load_initial_weights(untold, tmp_path / "var.pth")


@pytest.mark.parametrize("moe", [{"renormalize": True}, {"top_k": 3}, {"router": "token"}])
def test_weights_that_would_compute_something_else_are_refused(tmp_path: Path, moe: dict[str, object]) -> None:
    """No shape shows these keys (that of the router hides one table)."""

    def model(**moe: object) -> NextScaleTransformer:
        return NextScaleTransformer.from_preset(
            "mepa-d2", width=32, num_heads=2, scales=SCALES, code_width=4, moe={"num_experts": 4, **moe}
        )

    model().save_pretrained(tmp_path / "weights")
    (key, value), before = next(iter(moe.items())), MoEConfig()
    message = rf"init_weights: .*weights does not fit.*model\.moe\.{key}: {getattr(before, key)} there, {value} in"
    with pytest.raises(UserError, match=message):
        load_initial_weights(model(**moe), tmp_path / "weights")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": 2}', "expected an object such as"),
        ("[2]", "expected an object such as"),
        ('{"zero_optimization": {"stage": 2, "reduce_scatter": false}}', "reduce_scatter: false does not work"),
        ('{"zero_optimization": {"stage": 1, "contiguous_gradients": false}}', "contiguous_gradients: false does not"),
        ('{"zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": true}}', "'torch_autocast' belongs into"),
        ('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}', "round_robin_gradients and"),
    ],
)
def test_engine_knobs_that_cannot_work_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "knobs.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_knobs(tmp_path / "knobs.json")


def test_accumulation_in_fp32_needs_stage_2(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    parallel = {"deepspeed": str(tmp_path / "knobs.json"), "precision": "bf16"}
    config = validate(PretrainConfig, recipe_values(tmp_path) | {"parallel": parallel}, "test")
    (tmp_path / "knobs.json").write_text(json.dumps(knobs))
    with pytest.raises(UserError, match=r"knobs\.json: grad_accum_dtype fp32 needs ZeRO stage 2 in bf16"):
        build(config, 1)
    knobs["zero_optimization"]["stage"] = 2
    (tmp_path / "knobs.json").write_text(json.dumps(knobs))
    assert build(config, 1)["data_types"] == {"grad_accum_dtype": "fp32"}


def test_router_logits_that_are_not_finite_end_all_ranks_with_their_block(folder: Path) -> None:
    """Every rank skips the step, and then all end with a message that names the block."""
    model = NextScaleTransformer.load(folder / "moe")
    with torch.no_grad():
        model.get_parameter("blocks.1.ffn.router.gate.weight")[0] = 3e38  # a start from NaN is refused
    model.save_pretrained(folder / "broken")
    settings = ["parallel.ep_size=2", "train.steps=9", "guards.max_bad_steps=3"]
    codes, said = start(folder, "nan", f"init_weights={folder / 'broken'}", *settings, ranks=2)
    assert 0 not in codes
    assert None not in codes
    assert "router logits of blocks [1]: not finite, the step was skipped" in said
    assert "steps in a row were skipped (router logits of blocks [1]: not finite)" in said


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_not_rounded_on_their_way_into_the_optimizer(folder: Path, ranks: int) -> None:
    """In bf16, what is frozen leaves the run as it came, with experts on two ranks too, and so does its average."""
    settings = ["parallel.precision=bf16", f"parallel.ep_size={ranks}", "optim.freeze=[blocks.*]", "optim.ema=0.5"]
    name = f"unrounded{ranks}"
    codes, said = start(folder, name, f"init_weights={folder / 'moe'}", *settings, ranks=ranks)
    assert codes == [0] * ranks, said
    theirs = NextScaleTransformer.load(folder / "moe").state_dict()
    for made in ("last", "last_ema"):
        found = NextScaleTransformer.load(folder / name / made).state_dict()
        for key in theirs:
            assert torch.equal(found[key], theirs[key]) == key.startswith("blocks."), key
