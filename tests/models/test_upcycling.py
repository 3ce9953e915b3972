"""A MoE model built from a dense one starts where that one is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from mepa_ds.cli.upcycle import main as upcycle_command
from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig, MoEConfig
from mepa_ds.errors import UserError
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.models.upcycling import upcycle
from tests.var_fixtures import TINY_SCALES, fixture_state, vector

Router = Literal["stmoe", "smoe", "token"]


def dense_model() -> NextScaleTransformer:
    return NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"), scales=TINY_SCALES)


@pytest.mark.parametrize(
    ("router", "renormalize", "shared", "top_k"),
    [
        *itertools.product(["stmoe"], [True, False], [True, False], [2, 3]),
        *itertools.product(["stmoe"], [False], [True, False], [1]),
        ("smoe", False, True, 2),
    ],
)
def test_copies_give_the_dense_output(router: Router, renormalize: bool, shared: bool, top_k: int) -> None:
    moe = MoEConfig(router=router, renormalize=renormalize, shared_expert=shared, top_k=top_k, num_experts=5)
    model = upcycle(dense_model(), moe)
    with torch.no_grad():
        output = model(vector("labels"), vector("teacher_input"))
    torch.testing.assert_close(output.logits_BLV, vector("logits_adaln"), atol=2e-5, rtol=1e-4)
    if router == "stmoe":
        load = output.routing[0].counts_SE.sum(0)
        assert (load > 0).sum() > 1  # tokens are spread, not all sent to the first experts


@pytest.mark.parametrize(
    ("router", "renormalize", "shared", "top_k", "num_experts", "ratio"),
    [
        ("stmoe", False, False, 4, 4, 1.0),  # all four quarters, no choice
        ("stmoe", False, True, 3, 12, 1.0),  # the shared expert's quarter and sets of three
        ("stmoe", True, True, 2, 8, 1.5),  # three slices of 3/8: some hidden units are held twice
        ("token", False, False, 2, 6, 2.0),  # halves
        ("smoe", False, True, 1, 4, 2.0),
        ("stmoe", False, True, 2, 8, 3.0),
    ],
)
def test_sets_of_slices_that_cover_the_ffn_give_the_dense_output(
    router: Router, renormalize: bool, shared: bool, top_k: int, num_experts: int, ratio: float
) -> None:
    moe = MoEConfig(
        router=router,
        renormalize=renormalize,
        shared_expert=shared,
        top_k=top_k,
        num_experts=num_experts,
        expert_ratio=ratio,
    )
    model = upcycle(dense_model(), moe)
    assert model.config.expert_hidden == ratio * model.config.C
    with torch.no_grad():
        output = model(vector("labels"), vector("teacher_input"))
    torch.testing.assert_close(output.logits_BLV, vector("logits_adaln"), atol=2e-5, rtol=1e-4)
    set_counts = output.routing[0].counts_SE.sum(0).view(-1, top_k)
    assert (set_counts == set_counts[:, :1]).all()  # whole sets
    if router != "smoe" and num_experts > top_k:
        assert (set_counts[:, 0] > 0).sum() > 1  # more than one of them


def test_slices_that_do_not_cover_the_ffn_hold_different_units() -> None:
    """Sets of two eighths beside a shared eighth: the four sets hold all seven others, three of them twice at most."""
    dense = dense_model()
    model = upcycle(dense, MoEConfig(num_experts=8, top_k=2, expert_ratio=0.5))
    hidden = model.config.expert_hidden
    ffn: Any = model.blocks[0].ffn
    old: Any = dense.blocks[0].ffn
    torch.testing.assert_close(ffn.shared.fc1.weight, old.fc1.weight[:hidden])
    for e in range(7):
        torch.testing.assert_close(ffn.experts.fc1_weight[e], old.fc1.weight[(e + 1) * hidden : (e + 2) * hidden])
    torch.testing.assert_close(ffn.experts.fc1_weight[7], old.fc1.weight[hidden : 2 * hidden])


def test_experts_of_the_ffn_s_ratio_have_its_width() -> None:
    """72 x 4 = 288 is no multiple of 64: rounded experts would silently be slices."""
    dense = NextScaleTransformer.from_preset("var-d2", width=72, scales=(1, 2), codebook_size=16, code_width=4)
    with torch.no_grad():
        dense.head.weight.mul_(50)
        model = upcycle(dense, MoEConfig())
        labels, inputs = torch.tensor([0, 5]), torch.randn(2, 4, 4)
        expected, found = dense(labels, inputs).logits_BLV, model(labels, inputs).logits_BLV
    assert model.config.expert_hidden == 288
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [[], ["--renormalize", "--every", "2"]])
def test_the_command_writes_a_model_with_the_dense_output(tmp_path: Path, options: list[str]) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path / "dense")
    upcycle_command(
        ["--weights", str(tmp_path / "dense"), "--out", str(tmp_path / "moe"), "--num-experts", "3", *options]
    )
    model = NextScaleTransformer.load(tmp_path / "moe")
    moe = model.config.moe
    assert moe is not None
    assert (moe.num_experts, moe.renormalize, moe.every) == (3, bool(options), 2 if options else 1)
    with torch.no_grad():
        output = model(vector("labels"), vector("teacher_input"))
    assert len(output.routing) == model.config.depth // moe.every
    torch.testing.assert_close(output.logits_BLV, vector("logits_adaln"), atol=2e-5, rtol=1e-4)


def mixture_of(num_experts: int) -> NextScaleTransformer:
    return upcycle(dense_model(), MoEConfig(num_experts=num_experts, top_k=2, every=2))


def write_run(directory: Path, block: int, load_SE: list[list[float]]) -> Path:
    directory.mkdir()
    layer = {"load_scale": load_SE, "entropy_scale": [1.0] * len(load_SE)}
    records = [{"event": "train", "step": 4}, {"event": "routing", "step": 4, "layers": {str(block): layer}}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def test_a_mixture_gets_more_experts_or_keeps_the_most_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its other settings stay as they are."""
    old = mixture_of(4)
    old.save_pretrained(tmp_path / "old")
    words = ["--weights", str(tmp_path / "old"), "--out", str(tmp_path / "new")]
    upcycle_command([*words, "--num-experts", "8", "--top-k", "4"])
    more = NextScaleTransformer.load(tmp_path / "new").config.moe
    assert more is not None
    assert (more.num_experts, more.top_k, more.every) == (8, 4, 2)
    run = write_run(tmp_path / "run", 1, [[0.1, 0.4, 0.1, 0.4]] * 4)
    upcycle_command([*words, "--num-experts", "2", "--run", str(run)])
    assert "block 1: experts 1, 3 are kept" in capsys.readouterr().out
    fewer = NextScaleTransformer.load(tmp_path / "new")
    assert fewer.config.moe is not None
    assert (fewer.config.moe.num_experts, fewer.config.moe.top_k) == (2, 2)
    weights = (dict(model.named_parameters())["blocks.1.ffn.experts.fc1_weight"] for model in (fewer, old))
    assert torch.equal(next(weights), next(weights)[[1, 3]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-experts", "2"], r"have 4 experts, .*give 4 or more, or .*mepa upcycle --num-experts 2 --run RUN"),
        (["--num-experts", "2", "--run", "none"], r"--run: none: no metrics\.jsonl there; give the dir"),
        (
            ["--num-experts", "2", "--run", "short"],
            r"--run: short/metrics\.jsonl has no record of routing; give the dir",
        ),
        (["--num-experts", "4", "--run", "other"], r"--run: .*old has 4, and 4 are asked for; give a smaller"),
        (["--num-experts", "8", "--run", "other"], r"--run: .*old has 4, and 8 are asked for; give a smaller"),
        (
            ["--num-experts", "2", "--run", "other"],
            r"metrics\.jsonl is of another model: expected loads of 4 scales and",
        ),
        (
            ["--num-experts", "2", "--run", "torn"],
            r"metrics\.jsonl: a record is not as a run of this version writes it",
        ),
        (["--num-experts", "1"], r"top_k \(2\) must not exceed num_experts \(1\)"),
        (["--router", "smoe"], r"--router: .*old is a mixture with router stmoe, which .*; leave --router out"),
        (["--no-shared-expert"], r"--no-shared-expert: .*with shared_expert True, .*leave --no-shared-expert out"),
    ],
)
def test_what_a_mixture_cannot_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    mixture_of(4).save_pretrained("old")
    write_run(tmp_path / "other", 0, [[0.5, 0.5]] * 4)
    write_run(tmp_path / "torn", 1, [["x"] * 4] * 4)  # type: ignore[list-item]
    Path("short").mkdir()
    Path("short/metrics.jsonl").write_text('{"event": "train", "step": 4}\n')
    with pytest.raises(UserError, match=message):
        upcycle_command(["--weights", "old", "--out", "new", *words])
    assert not list(Path().glob("new/*"))


def test_a_run_has_nothing_to_tell_about_a_dense_model(tmp_path: Path) -> None:
    dense_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match=r"--run: .*dense is dense, it has no experts to choose from; leave --run out"):
        upcycle_command(["--weights", str(tmp_path / "dense"), "--out", str(tmp_path / "moe"), "--run", str(tmp_path)])


def test_weights_are_not_replaced_by_what_is_made_of_them(tmp_path: Path) -> None:
    dense_model().save_pretrained(tmp_path / "dense")
    (tmp_path / "link").symlink_to("dense")
    with pytest.raises(UserError, match=r"--out: .*link is --weights, which would be replaced; choose another"):
        upcycle_command(["--weights", str(tmp_path / "dense"), "--out", str(tmp_path / "link")])
    assert NextScaleTransformer.load(tmp_path / "dense").config.moe is None


def test_nothing_is_made_of_broken_weights(tmp_path: Path) -> None:
    model = dense_model()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match=r"dense: NaN or infinity in 1 of its \d+ tensors, such as head\.weight; give"):
        upcycle_command(["--weights", str(tmp_path / "dense"), "--out", str(tmp_path / "moe")])


def test_experts_wider_than_the_ffn_are_refused() -> None:
    with pytest.raises(UserError, match=r"expert_ratio: experts of hidden width 1024 .* FFN of 512"):
        upcycle(dense_model(), MoEConfig(expert_ratio=8.0))
    with pytest.raises(UserError, match="experts already"):
        upcycle(upcycle(dense_model(), MoEConfig()), MoEConfig())


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"router": "expert_choice"}, "router: expert_choice gives tokens any number of experts"),
        ({"bias_rate": 0.001}, "bias_rate: a router fresh from upcycling .* all tokens would go to the same experts"),
    ],
)
def test_what_would_not_equal_the_dense_model_is_refused(moe: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        upcycle(dense_model(), MoEConfig(**moe))


def test_renormalising_one_choice_is_refused() -> None:
    with pytest.raises(UserError, match=r"moe: renormalize with top_k 1 makes every weight 1"):
        validate(ModelConfig, {"moe": {"renormalize": True, "top_k": 1}}, "model")
