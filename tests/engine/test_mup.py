"""muP: the role of every weight, what it changes, and what it is for: rates that do not depend on the width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mepa_ds.checkpoint.files import checkpoint_name
from mepa_ds.checkpoint.store import read_tensors, stored_tensors
from mepa_ds.config.objective import AlignmentConfig, ObjectiveConfig
from mepa_ds.config.optim import PretrainOptimConfig
from mepa_ds.engine.optimizer import build_optimizer, has_decay
from mepa_ds.models.parametrisation import role_of
from mepa_ds.objective.objective import PretrainingObjective
from tests.engine.mup_runs import Run, best_rate, make_model, slope
from tests.ranks import arguments, finish
from tests.tiny_run import losses, make_run

WIDTHS = (32, 64, 128)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"moe": None, "shared_adaln": True},
    {"moe": {"num_experts": 2, "expert_ratio": 4.0, "router": "smoe", "shared_expert": False}, "qk_norm": False},
]


def objective(width: int, base_width: int | None = None, **changes: Any) -> PretrainingObjective:
    alignment = AlignmentConfig(scales=(2, 3), projector_hidden=24, block=0)
    made = PretrainingObjective(make_model(width, **changes), ObjectiveConfig(alignment=alignment), teacher_width=6)
    made.init_weights(0, base_width)
    return made


@pytest.mark.parametrize("changes", VARIANTS)
def test_roles_are_those_of_the_shapes(changes: dict[str, Any]) -> None:
    """What grows with the width decides: the fan-in, both fans, or neither fan-in."""
    narrow, wide = (dict(objective(width, **changes).named_parameters()) for width in (128, 256))
    for name, parameter in narrow.items():
        grows = [big > small for big, small in zip(wide[name].shape, parameter.shape, strict=True)]
        is_matrix = parameter.ndim >= 2 and has_decay(name, parameter) and not name.endswith("class_embed.weight")
        fan_out, fan_in = grows[-2:] if is_matrix else (True, False)
        expected = {(True, True): "hidden", (False, True): "output"}.get((fan_out, fan_in), "input")
        assert role_of(name) == expected, name


@pytest.mark.parametrize("changes", VARIANTS)
def test_rates_and_decay(changes: dict[str, Any]) -> None:
    """At four times the base width; the product of rate and decay is that of the base width."""
    model = objective(128, 32, **changes)
    optimizer = build_optimizer(model, PretrainOptimConfig(mup_base_width=32, weight_decay=0.06), 128)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        assert group["lr_scale"] == (1.0 if role_of(name) == "input" else 0.25), name
        assert group["lr_scale"] * group["weight_decay"] == pytest.approx(0.06 if has_decay(name, parameter) else 0)


def std(parameter: nn.Parameter) -> float:
    return float(parameter.detach().double().std())


@pytest.mark.parametrize("changes", VARIANTS)
def test_initial_weights(changes: dict[str, Any]) -> None:
    """Against the standard model of the same width, from the same random numbers, and against the base model."""
    base, standard, mup = objective(32, **changes), objective(128, **changes), objective(128, 32, **changes)
    small = dict(base.named_parameters())
    for (name, plain), ours in zip(standard.named_parameters(), mup.parameters(), strict=True):
        factor = {"input": 2.0, "hidden": 1.0, "output": 0.5}[role_of(name)]  # sqrt(4), and one over it
        if name.endswith("log_temperature") or ("projector" in name and role_of(name) == "input"):
            factor = 1.0  # no width in them
        torch.testing.assert_close(ours, plain * factor, rtol=1e-5, atol=1e-7, msg=name)
        if (
            role_of(name) != "hidden" and ours.numel() > 2000 and std(ours)
        ):  # the law itself, in words of the base width
            expected = std(small[name]) / (4 if role_of(name) == "output" else 1)
            assert std(ours) == pytest.approx(expected, rel=0.1), name


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take most of the time of models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mup")
    make_run(folder, "log.checkpoint_every=4", "log.evaluate_every=100", "train.steps=8")
    return folder


def test_at_the_base_width_a_run_is_the_standard_one_bit_by_bit(folder: Path) -> None:
    """The tiny run is 32 wide."""
    for name, base in (("standard", "null"), ("base", "32")):
        finish(arguments(folder, name, f"optim.mup_base_width={base}"), 2, folder / f"{name}.log")
    assert losses(folder / "standard") == losses(folder / "base")
    paths = [folder / name / "checkpoints" / checkpoint_name(8) for name in ("standard", "base")]
    names = list(stored_tensors(paths[0]))
    one, other = (read_tensors(path, names) for path in paths)
    assert all(torch.equal(one[name], other[name]) for name in names)


def test_groups_do_not_show_in_checkpoints(folder: Path) -> None:
    """From two ranks that share the experts to one, and from muP's groups to the standard ones."""
    mup = "optim.mup_base_width=8"
    finish(arguments(folder, "whole", mup), 2, folder / "whole.log")
    finish(
        arguments(folder, "cut", mup, "parallel.ep_size=2", "train.steps=4", "optim.schedule=constant"),
        2,
        folder / "cut.log",
    )
    finish(arguments(folder, "one", mup, "optim.schedule=constant"), 1, folder / "one.log")
    finish(arguments(folder, "cut", mup, "optim.schedule=constant"), 1, folder / "cut2.log")
    assert losses(folder / "cut") == pytest.approx(losses(folder / "one"), rel=1e-4)
    before = losses(folder / "cut")[:4]
    (folder / "cut/checkpoints" / checkpoint_name(8)).rename(folder / "aside")
    said = finish(arguments(folder, "cut", "optim.schedule=constant", "train.steps=5"), 2, folder / "cut3.log")
    assert "optim.mup_base_width 8 -> null" in said
    assert losses(folder / "cut")[:4] == before
    assert losses(folder / "cut")[4] == pytest.approx(losses(folder / "one")[4], rel=1e-4)  # the loss before its update


def slopes(base_width: int | None) -> tuple[dict[str, float], dict[str, float]]:
    """Exponents in the width of mean |.| after 4 steps, and of its change: by name, over three seeds."""
    size: dict[str, list[float]] = {}
    change: dict[str, list[float]] = {}
    for width in WIDTHS:
        runs = [Run(width, base_width, seed) for seed in range(3)]
        first = [run.activations() for run in runs]
        for run in runs:
            run.train(4, lr=2e-3, batch=32)
        for name in first[0]:
            after = [run.activations()[name] for run in runs]
            moved = [(now - then[name]).abs().mean().item() for now, then in zip(after, first, strict=True)]
            size.setdefault(name, []).append(float(np.mean([now.abs().mean().item() for now in after])))
            change.setdefault(name, []).append(float(np.mean(moved)))
    return tuple({name: slope(WIDTHS, values) for name, values in found.items()} for found in (size, change))  # type: ignore[return-value]


def test_the_coordinate_check(one_thread: None) -> None:
    """Under muP an update moves activations and logits by the same amount at every width (arXiv 2203.03466, D.1).

    The initial logits shrink as 1 / sqrt(width), which is a part of muP; what must not depend on it is what is learned.
    """
    size, change = slopes(32)
    assert set(change) == {"block 0", "block 1", "router", "logits"}
    # The part of the router's change that goes through its initial weights shrinks with them.
    assert all(abs(change[name]) < (0.3 if name == "router" else 0.1) for name in change), change
    assert all(abs(size[name]) < 0.1 for name in ("block 0", "block 1")), size
    size, change = slopes(None)
    assert change["logits"] > 0.7, change
    assert change["router"] > 0.5, change
    assert size["block 1"] < -0.3, size


@pytest.mark.slow
def test_the_best_rate_stays_over_four_times_the_width(one_thread: None) -> None:
    """It moves by less than a factor of 2; in the standard parametrisation by more."""
    rates = [2.0**-power for power in range(11, 3, -1)]

    def best(width: int, base_width: int | None) -> float:
        ends = [np.mean(Run(width, base_width).train(80, lr, batch=16)[-20:]) for lr in rates]
        return best_rate(rates, [float(end) for end in ends])

    narrow, mup, standard = best(32, 32), best(128, 32), best(128, None)
    print(f"best rates: {narrow:.2e} at the base width; {mup:.2e} with muP, {standard:.2e} without, at four times it")
    assert abs(math.log2(mup / narrow)) < 1, (narrow, mup)
    assert abs(math.log2(standard / narrow)) > 1, (narrow, standard)
