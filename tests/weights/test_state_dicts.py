"""Which of several nested state dicts is meant."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.weights.state_dict_files import read_checkpoint, read_state_dict, read_with_rest
from mepa_ds.weights.state_dicts import Wanted, find, nests_of

WANTED = Wanted("a toy", ("stem.weight", "blocks.0.weight", "head.weight"))


def toy(value: float) -> dict[str, Tensor]:
    return {name: torch.full((2,), value) for name in (*WANTED.names, "head.bias")}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


OTHER = {"conv.weight": torch.zeros(3), "conv.bias": torch.zeros(3)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "tree",
    [
        {"trainer": {"net": toy(1), "vae": OTHER, "opt": OPTIMIZER}, "epoch": 3},
        {"optimizer": OPTIMIZER, "a": {"b": {"c": {"d": toy(1)}}}},
        {"models": [OTHER, toy(1)]},
        {"discriminator": OTHER, "state_dict": {**prefixed("net.", toy(1)), **prefixed("loss.", OTHER)}},
        {**prefixed("module.backbone.", toy(1)), "n_averaged": torch.tensor(7)},
        {"model": {**toy(1), "n_averaged": torch.tensor(7)}},
        {"module": toy(1), "ema": toy(1)},
    ],
)
def test_the_one_with_the_wanted_names_is_found(tmp_path: Path, tree: Any) -> None:
    torch.save(tree, tmp_path / "w.pth")
    found = read_state_dict(tmp_path / "w.pth", wanted=WANTED)
    assert found.keys() == toy(1).keys()
    assert all(tensor.eq(1).all() for tensor in found.values())


@pytest.mark.parametrize(
    ("tree", "labels"),
    [
        ({"model": toy(1), "ema": toy(2)}, "'model', 'ema'"),
        ({"model": toy(1), "train": {"ema_model": toy(2), "opt": OPTIMIZER}}, "'model', 'train.ema_model'"),
        (
            {"state_dict": {**prefixed("net.", toy(1)), **prefixed("net_ema.module.", toy(2))}},
            "'state_dict.net', 'state_",
        ),
        ({**toy(1), **prefixed("ema.", toy(2))}, "the outermost names, 'ema'"),
    ],
)
def test_several_are_refused_with_a_command_that_works(tmp_path: Path, tree: Any, labels: str) -> None:
    path = tmp_path / "w and v.pth"
    torch.save(tree, path)
    with pytest.raises(UserError, match=f"one state dict of a toy in it, with other values: {labels}") as error:
        read_state_dict(path, wanted=WANTED)
    assert_command_works(str(error.value), tmp_path)


def test_the_command_for_safetensors_works(tmp_path: Path) -> None:
    save_file({**prefixed("net.", toy(1)), **prefixed("ema.", toy(2))}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="'ema', 'net'") as error:
        read_state_dict(tmp_path / "w.safetensors", wanted=WANTED)
    assert_command_works(str(error.value), tmp_path, 1)
    assert load_file(tmp_path / "w-net.safetensors").keys() == prefixed("net.", toy(1)).keys()


def assert_command_works(message: str, folder: Path, value: float = 2) -> None:
    """It is run in this process, as `python -c` would, and writes the weights of that value."""
    before = set(folder.iterdir())
    words = shlex.split(message[message.index("python -c") :])
    assert words[:2] == ["python", "-c"]
    exec(words[2], {})
    (new,) = set(folder.iterdir()) - before
    assert all(tensor.eq(value).all() for tensor in read_state_dict(new, wanted=WANTED).values())


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    torch.save({"a": OTHER, "b": {"x.y": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no state dict of a toy among .*'a' \(conv\.weight, .*\), 'b' \(x\.y"):
        read_state_dict(tmp_path / "w.pth", wanted=WANTED)
    torch.save({"a": OTHER, "optimizer": OPTIMIZER}, tmp_path / "w.pth")
    assert read_state_dict(tmp_path / "w.pth", wanted=WANTED).keys() == OTHER.keys()  # the reader says what it lacks


def test_wanted_by_nobody_it_is_the_outermost(tmp_path: Path) -> None:
    torch.save({"anything": OTHER, "optimizer": OPTIMIZER}, tmp_path / "w.pth")
    assert read_state_dict(tmp_path / "w.pth").keys() == OTHER.keys()
    torch.save({"model": toy(1), "ema": toy(2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="more than one state dict in it"):
        read_state_dict(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"the state dict: more than one .* Give the one you mean alone"):
        read_state_dict({"model": toy(1), "ema": toy(2)})  # type: ignore[dict-item]


def test_names_that_would_become_one_stay_as_they_are() -> None:
    state = {**toy(1), "module.head.weight": torch.zeros(2)}
    assert read_state_dict(state, wanted=WANTED).keys() == state.keys()


def test_a_file_that_holds_itself_is_walked_once() -> None:
    tree: dict[str, Any] = {"model": toy(1)}
    tree["self"] = tree["model"]["list"] = [tree, tree]
    assert list(nests_of(tree)) == [("model",)]
    assert find(nests_of(tree), WANTED, "w").place == ("model",)


def test_settings_beside_the_weights_come_along(tmp_path: Path) -> None:
    tree = {"args": {"depth": 1}, "inner": {"config": {"depth": 2}, "net": toy(1)}, "other": {"config": {"depth": 3}}}
    torch.save(tree, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth", WANTED)[1] == [{"depth": 2}, {"depth": 1}]


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"model": toy(1), "ema": {"decay": 0.9, "shadow_params": [torch.zeros(2), torch.zeros(2)]}}, "ema"),
        ({"state_dict": {**prefixed("model.", toy(1)), "model_ema.stemweight": torch.zeros(2)}}, "model_ema"),
        ({"state": {"net": toy(1)}, "ema_params": {"stem/weight": torch.zeros(2)}}, "ema_params"),
    ],
)
def test_averages_that_cannot_be_read_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tree: Any, key: str
) -> None:
    torch.save(tree, tmp_path / "w.pth")
    for _ in range(2):
        assert read_state_dict(tmp_path / "w.pth", wanted=WANTED)["head.weight"].eq(1).all()
    assert capsys.readouterr().err.count(f"averaged weights under {key!r} are in a form that is not read") == 1


def test_a_number_of_that_name_is_no_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is an average that equals the weights left out."""
    torch.save({"model": {**toy(1), "ema_hits": torch.zeros(1)}, "ema": 0.999, "args": {"ema": {}}}, tmp_path / "w.pth")
    torch.save({"model": toy(1), "ema": prefixed("module.", toy(1))}, tmp_path / "v.pth")
    for name in ("w.pth", "v.pth"):
        assert read_state_dict(tmp_path / name, wanted=WANTED).keys() >= toy(1).keys()
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / name}: took the weights under 'model'" for name in ("w.pth", "v.pth")
    ]


def test_what_was_taken_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"trainer": {"net": toy(1), "vae": OTHER}}, tmp_path / "w.pth")
    save_file({**prefixed("module.net.", toy(1)), **OTHER}, tmp_path / "w.safetensors")
    torch.save(prefixed("module.", toy(1)), tmp_path / "plain.pth")
    for _ in range(2):
        for name in ("w.pth", "w.safetensors", "plain.pth"):
            assert read_state_dict(tmp_path / name, wanted=WANTED).keys() == toy(1).keys()
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'w.pth'}: took the weights under 'trainer.net'",
        f"{tmp_path / 'w.safetensors'}: took the weights under 'net'",
    ]


def test_another_layout_of_the_same_network(tmp_path: Path) -> None:
    """Its names stand behind a prefix too, and what is beside them is told."""
    wanted = Wanted("a toy", WANTED.names, (("input.w", "layer.0.w", "output.w"),))
    other = {"input.w": torch.ones(2), "layer.0.w": torch.zeros(2), "output.w": torch.ones(1)}
    save_file({**prefixed("net.", other), "extra.bias": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"state": {**prefixed("module.net.", other), "extra.bias": torch.ones(1)}}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        state, rest = read_with_rest(tmp_path / name, wanted)
        assert state.keys() == other.keys()
        assert rest == ("extra.bias",)
    with pytest.raises(UserError, match="no state dict of a toy"):
        read_state_dict({"a": {"x": torch.ones(1)}, "b": {"y": torch.ones(1)}}, wanted=wanted)  # type: ignore[dict-item]
    torch.save({"theirs": prefixed("net.", other), "ours": toy(1.0)}, tmp_path / "both.pth")
    with pytest.raises(UserError, match="more than one state dict of a toy in it"):
        read_state_dict(tmp_path / "both.pth", wanted=wanted)
