"""Weights of one model as a start for another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mepa_ds.config.model import SCALES_256, SCALES_512, ModelConfig, MoEConfig
from mepa_ds.engine.starting.initial_weights import load_initial_weights
from mepa_ds.errors import UserError
from mepa_ds.models.adapting.adapt import CLASSES, Missing, adapt
from mepa_ds.models.adapting.experts import fewer_experts, more_experts, most_used
from mepa_ds.models.adapting.scales import POSITIONS, SCALES, resampled
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.models.var_checkpoint import name_in_var
from mepa_ds.scales import ScaleSchedule


def model_of(**changes: Any) -> NextScaleTransformer:
    """With weights that the output depends on, in evaluation mode."""
    values: dict[str, Any] = {
        "width": 32,
        "num_heads": 2,
        "num_classes": 4,
        "scales": (1, 2, 4),
        "codebook_size": 16,
        "code_width": 4,
    }
    values |= {"ffn_ratio": 2.0, "head_init": 5.0, "adaln_gamma_init": 0.5, "adaln_init": 0.5, **changes}
    return NextScaleTransformer.from_preset("var-d2", **values).eval()


def logits_of(model: NextScaleTransformer) -> torch.Tensor:
    torch.manual_seed(1)
    inputs_BLZ = torch.randn(2, model.schedule.num_tokens - 1, 4)
    with torch.no_grad():
        return model(torch.tensor([0, 2]), inputs_BLZ).logits_BLV


sides = st.lists(st.integers(2, 12), unique=True, max_size=4).map(lambda found: ScaleSchedule.of([1, *sorted(found)]))


@settings(deadline=None)
@given(sides, sides)
def test_resampled_embeddings(theirs: ScaleSchedule, ours: ScaleSchedule) -> None:
    """Shapes of the new schedule; a constant stays one; the coarsest and the finest scale keep their roles."""
    state = {
        "start_embed": torch.full((1, 1, 3), 7.0),
        POSITIONS: torch.full((1, theirs.num_tokens, 3), 2.0),
        SCALES: torch.arange(float(theirs.num_scales))[:, None].expand(-1, 3),
        "blocks.0.ffn.router.scale_logits_SE": torch.full((theirs.num_scales, 5), 3.0),
        "head.weight": torch.ones(2, 2),
    }
    found = resampled(state, theirs, ours)
    assert "head.weight" not in found
    torch.testing.assert_close(found["start_embed"], state["start_embed"])
    torch.testing.assert_close(found[POSITIONS], torch.full((1, ours.num_tokens, 3), 2.0))
    torch.testing.assert_close(found["blocks.0.ffn.router.scale_logits_SE"], torch.full((ours.num_scales, 5), 3.0))
    places = found[SCALES][:, 0]
    assert (places.diff() > -1e-6).all()
    if ours.num_scales > 1:
        assert places[-1].item() == pytest.approx(theirs.num_scales - 1, abs=1e-5)
        assert places[0].item() == pytest.approx(0, abs=1e-5)
    if theirs == ours:
        torch.testing.assert_close(found[SCALES], state[SCALES])


def test_vars_scales_of_512_pixels_take_the_places_of_those_of_256() -> None:
    """Scale by scale; a map that varies along a row does so still."""
    theirs, ours = ScaleSchedule.of(SCALES_256), ScaleSchedule.of(SCALES_512)
    rows = torch.cat([torch.linspace(-1, 1, side)[None].expand(side, side).flatten() for side in theirs.sides])
    state = {
        "start_embed": torch.zeros(1, 1, 1),
        POSITIONS: rows[None, :, None],
        SCALES: torch.arange(10.0)[:, None],
    }
    found = resampled(state, theirs, ours)
    assert torch.equal(found[SCALES], state[SCALES])
    finest = found[POSITIONS][0, -32 * 32 :, 0].view(32, 32)
    assert (finest.diff(dim=1)[:, 2:-2] > 0).all()
    assert (finest.diff(dim=0).abs() < 1e-5).all()


@pytest.mark.parametrize("router", ["stmoe", "smoe", "token"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_copies_of_all_experts_give_the_old_output(router: str, renormalize: bool) -> None:
    """Twice the experts, twice the choices. The router's noise changes the probabilities by a hundredth or so."""
    moe = {"num_experts": 4, "top_k": 2, "router": router, "renormalize": renormalize}
    old = model_of(moe=moe)
    new = model_of(moe=moe | {"num_experts": 8, "top_k": 4})
    with torch.no_grad():
        for name, parameter in old.named_parameters():
            if name.endswith((".gate.weight", ".scale_logits_SE")):
                parameter.mul_(50)  # choices that the noise does not turn
    new.load_state_dict(more_experts(old.state_dict(), 8))
    expected = logits_of(old)
    assert (logits_of(new) - expected).abs().max() < 0.05 * expected.std()
    with pytest.raises(
        UserError, match=r"the weights have 8 experts, .* for 3; give 8 or more, or .*--num-experts 3 --run RUN"
    ):
        more_experts(new.state_dict(), 3)


@pytest.mark.parametrize("router", ["stmoe", "smoe", "token"])
def test_the_kept_experts_are_those_that_were_used(router: str) -> None:
    """Where the routers use no other ones, the output is the old one: with renormalised shares of the chosen two."""
    moe = {"num_experts": 6, "top_k": 2, "router": router, "renormalize": True, "bias_rate": 0.01}
    old = model_of(moe=moe)
    kept = {0: [1, 4, 5], 1: [0, 2, 3]}
    with torch.no_grad():
        for block, experts in kept.items():
            others = [expert for expert in range(6) if expert not in experts]
            router_of_block: Any = old.get_submodule(f"blocks.{block}.ffn.router")
            for parameter in router_of_block.parameters():
                parameter.mul_(50)
            router_of_block.bias_steps_E[others] = -(10**6)
    loads = {block: [[float(e in experts) for e in range(6)]] * 3 for block, experts in kept.items()}
    assert most_used(loads, old.schedule.lengths, 3) == kept
    new = model_of(moe=moe | {"num_experts": 3})
    new.load_state_dict(fewer_experts(old.state_dict(), kept))
    torch.testing.assert_close(logits_of(new), logits_of(old), atol=1e-5, rtol=1e-5)


def test_the_most_used_are_counted_in_tokens() -> None:
    """A coarse scale's favourite has few tokens; of equals the first is kept."""
    assert most_used({3: [[1.0, 0.0, 0.0], [0.0, 0.6, 0.4]]}, (1, 4), 1) == {3: [1]}
    assert most_used({0: [[0.2, 0.4, 0.4]]}, (1,), 1) == {0: [1]}


def adapted(
    theirs: NextScaleTransformer, ours: ModelConfig, missing: Missing, their_classes: Any = (), our_classes: Any = ()
) -> NextScaleTransformer:
    target = NextScaleTransformer(ours).eval()
    found = adapt(
        theirs.config,
        theirs.state_dict(),
        their_classes,
        ours,
        our_classes,
        missing,
        lambda: target.class_embed.weight.detach().clone(),
    )
    target.load_state_dict(found.state)
    return target


def test_classes_are_taken_by_name() -> None:
    theirs, ours = model_of(), model_of(num_classes=3)
    found = adapted(theirs, ours.config, "classes", ("cat", "dog", "boot", "bag"), ("bag", "hat", "cat"))
    old, drawn, new = (model.class_embed.weight for model in (theirs, ours, found))
    assert torch.equal(new[[0, 2, 3]], old[[3, 0, 4]])
    assert torch.equal(new[1], drawn[1])
    same = adapted(theirs, theirs.config, "classes", ("a", "b", "c", "d"), ("a", "b", "c", "d"))
    assert torch.equal(same.class_embed.weight, old)


def test_a_dense_model_becomes_a_mixture_of_other_scales() -> None:
    theirs = model_of()
    moe = MoEConfig(num_experts=4, top_k=2, expert_ratio=2.0)
    ours = theirs.config.model_copy(update={"scales": (1, 2, 3, 4), "moe": moe})
    resized = adapted(theirs, theirs.config.model_copy(update={"scales": (1, 2, 3, 4)}), "scales")
    mixture = adapted(theirs, ours, "all")
    torch.testing.assert_close(logits_of(mixture), logits_of(resized), atol=1e-4, rtol=0)


def test_a_run_starts_with_other_scales_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_of().save_pretrained(tmp_path / "weights")
    run = model_of(scales=(1, 2, 3, 4), num_classes=7)
    with pytest.raises(UserError, match=r"model.scales: .*or set init_missing=scales, which resamples"):
        load_initial_weights(run, tmp_path / "weights")
    load_initial_weights(run, tmp_path / "weights", "scales")
    said = capsys.readouterr().err
    assert "was trained with scales [1, 2, 4]: embeddings of positions and scales are resampled" in said
    assert "knows 4 classes, model.num_classes is 7: embeddings of the classes start anew" in said
    assert torch.equal(run.head.weight, model_of().head.weight)


def test_a_file_that_does_not_tell_its_schedule(tmp_path: Path) -> None:
    """VAR's is tried, then the recipe's; else the message says how to tell it."""
    state = {name_in_var(name): tensor for name, tensor in model_of().state_dict().items()}
    torch.save(state, tmp_path / "var.pth")
    run = model_of(num_classes=7)
    load_initial_weights(run, tmp_path / "var.pth", "scales")
    assert torch.equal(run.position_embed, model_of().position_embed)
    with pytest.raises(UserError, match=r"SCALES\)\.save_pretrained\(DIRECTORY\), and init_weights=DIRECTORY"):
        load_initial_weights(model_of(scales=(1, 2, 3, 4)), tmp_path / "var.pth", "scales")


@pytest.mark.parametrize(("missing", "starts"), [("classes", False), ("scales", False), ("all", True)])
def test_experts_are_made_where_that_is_asked_for(tmp_path: Path, missing: Missing, starts: bool) -> None:
    model_of().save_pretrained(tmp_path / "weights")
    run = model_of(moe={"num_experts": 4, "expert_ratio": 2.0})
    if starts:
        load_initial_weights(run, tmp_path / "weights", missing)
        torch.testing.assert_close(logits_of(run), logits_of(model_of()), atol=1e-4, rtol=0)
    else:
        with pytest.raises(UserError, match="init_missing=all makes one without a file of its own"):
            load_initial_weights(run, tmp_path / "weights", missing)


def test_embeddings_of_another_number_than_the_config_says(tmp_path: Path) -> None:
    theirs = model_of()
    state = theirs.state_dict()
    state[CLASSES] = state[CLASSES][:3]
    with pytest.raises(UserError, match=r"class_embed\.weight: \(3, 32\), expected \(5, 32\)"):
        adapt(theirs.config, state, (), model_of(num_classes=9).config, (), "all", lambda: torch.empty(10, 32))
