"""Reading foreign state dicts safely, strict loading, and the Hugging Face layout."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mepa_ds.config.base import Section
from mepa_ds.errors import UserError
from mepa_ds.weights import directories as weights


class ToyConfig(Section):
    width: int = 3
    sides: tuple[int, ...] = (1, 2)


class Bomb:
    """Unpickling it would make a directory: the test sees whether anything was executed."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def toy_state() -> dict[str, Tensor]:
    return {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4), "b.weight": torch.randn(4, 4).bfloat16()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_torch_files_are_read_plain_or_nested(tmp_path: Path, nest: str | None) -> None:
    state = toy_state()
    torch.save({nest: state, "epoch": 3} if nest else state, tmp_path / "w.pth")
    assert_same(weights.read_state_dict(tmp_path / "w.pth"), state)


def test_safetensors_and_mappings_are_read(tmp_path: Path) -> None:
    state = toy_state()
    save_file(state, tmp_path / "w.safetensors")
    assert_same(weights.read_state_dict(str(tmp_path / "w.safetensors")), state)
    assert_same(weights.read_state_dict(state), state)
    assert_same(weights.read_state_dict(state, prefix="b."), {"b.weight": state["b.weight"]})


def test_a_pickle_with_more_than_tensors_is_refused_and_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    torch.save({"weight": torch.zeros(2), "payload": Bomb(trace)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"payload": Bomb(trace)}, protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(UserError, match=r"not a plain state dict.*nothing in it was executed"):
            weights.read_state_dict(tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize(("protocol", "held"), [(2, r"argparse\.Namespace"), (4, "something else")])
def test_a_refusal_names_what_the_file_holds_and_no_unsafe_way(tmp_path: Path, protocol: int, held: str) -> None:
    data = {"weight": torch.zeros(2), "args": argparse.Namespace(lr=1)}
    torch.save(data, tmp_path / "w.pth", pickle_protocol=protocol)
    with pytest.raises(UserError, match=rf"w\.pth: not a plain state dict of tensors \(it holds {held}\)") as error:
        weights.read_state_dict(tmp_path / "w.pth")
    assert not re.search(r"weights_only|\x1b", str(error.value))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_one_message(tmp_path: Path, zipped: bool) -> None:
    """Cut anywhere, or with some bytes changed: torch raises a dozen kinds of errors."""
    path, random = tmp_path / "w.pth", np.random.default_rng(0)
    torch.save(toy_state(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        if random.random() < 0.3:
            del data[int(random.integers(len(whole))) :]
        for place in random.integers(len(data), size=4) if data else ():
            data[place] = random.integers(256)
        path.write_bytes(data)
        try:
            weights.read_state_dict(path)  # the values may be damaged alone
        except UserError as error:
            assert re.match(r".*w\.pth: (not a plain state dict of tensors|damaged, or not a)", str(error))  # noqa: PT017


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_the_prefixes_of_wrappers_are_taken_off(tmp_path: Path, wrapper: str) -> None:
    state = toy_state()
    wrapped = {wrapper + name: tensor for name, tensor in state.items()}
    torch.save({"model": wrapped}, tmp_path / "w.pth")
    save_file(wrapped, tmp_path / "w.safetensors")
    (tmp_path / "hub").mkdir()
    save_file(wrapped, tmp_path / "hub" / "model.safetensors")
    for source in (tmp_path / "w.pth", tmp_path / "w.safetensors", tmp_path / "hub", wrapped):
        assert_same(weights.read_state_dict(source), state)
        assert_same(weights.read_state_dict(source, prefix="b."), {"b.weight": state["b.weight"]})
    mixed = {**wrapped, "c.bias": torch.zeros(1)}  # one module was compiled, another was not
    assert_same(weights.read_state_dict(mixed), {**state, "c.bias": mixed["c.bias"]})


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 1}, {"a": {"b": [torch.zeros(1)]}}, {}, {3: torch.zeros(1)}])
def test_other_contents_are_named(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="not a plain state dict of tensors"):
        weights.read_state_dict(tmp_path / "w.pth")


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.pth: cannot read the weights: No such file"):
        weights.read_state_dict(tmp_path / "no.pth")
    with pytest.raises(UserError, match=r"no\.safetensors: cannot read the weights"):
        weights.read_state_dict(tmp_path / "no.safetensors")
    save_file(toy_state(), tmp_path / "w.safetensors")
    torn = (tmp_path / "w.safetensors").read_bytes()[:-8]
    (tmp_path / "w.safetensors").write_bytes(torn)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        weights.read_state_dict(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        weights.read_state_dict(tmp_path)


def test_load_strict_names_keys_and_shapes() -> None:
    module = nn.Sequential()
    module.add_module("first", nn.Linear(3, 4))
    module.add_module("second", nn.Linear(4, 4))
    good = module.state_dict()
    renamed = {name.replace("second.weight", "secnd.weight"): value for name, value in good.items()}
    with pytest.raises(UserError, match=r"w\.pth.*1 missing: second\.weight \(nearest: secnd\.weight\)") as error:
        weights.load_strict(module, renamed, "w.pth")
    assert "1 unexpected: secnd.weight (nearest: second.weight)" in str(error.value)
    with pytest.raises(UserError, match=r"first\.weight: \(4, 5\) in the weights, \(4, 3\) in the model"):
        weights.load_strict(module, {**good, "first.weight": torch.zeros(4, 5)}, "w.pth")
    with pytest.raises(UserError, match=r"7 unexpected: .* and 2 more"):
        weights.load_strict(module, {**good, **{f"x{i}": torch.zeros(1) for i in range(7)}}, "w.pth")
    doubled = {name: 2 * value for name, value in good.items()}
    weights.load_strict(module, doubled, "w.pth")
    torch.testing.assert_close(module.state_dict()["first.bias"], doubled["first.bias"], rtol=0, atol=0)


def test_pretrained_round_trip_in_one_file_and_in_shards(tmp_path: Path) -> None:
    state, config = toy_state(), ToyConfig(width=7)
    weights.save_pretrained(tmp_path, config, state, "toy", max_shard_bytes=70)
    index = json.loads((tmp_path / weights.INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(state)
    assert len(set(index["weight_map"].values())) > 1
    found_config, found = weights.read_pretrained(tmp_path, ToyConfig, "toy")
    assert found_config == config
    assert_same(found, state)
    assert_same(
        weights.read_pretrained(tmp_path, ToyConfig, "toy", prefix="a.")[1],
        {name: value for name, value in state.items() if name.startswith("a.")},
    )

    (tmp_path / "model_ema.safetensors").touch()  # not ours: it stays
    weights.save_pretrained(tmp_path, config, state, "toy")
    names = ["config.json", "model.safetensors", "model_ema.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert_same(weights.read_pretrained(tmp_path, ToyConfig, "toy")[1], state)
    assert weights.read_kind(tmp_path) == "toy"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_weights_are_as_readable_as_any_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        weights.save_pretrained(tmp_path, ToyConfig(), toy_state(), "toy", max_shard_bytes=70)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {oct(mode)}


def test_pretrained_directories_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json here"):
        weights.read_pretrained(tmp_path, ToyConfig, "toy")
    weights.save_pretrained(tmp_path, ToyConfig(), toy_state(), "toy", max_shard_bytes=70)
    with pytest.raises(UserError, match=r"expected a tokenizer, but .* holds 'toy'"):
        weights.read_pretrained(tmp_path, ToyConfig, "tokenizer")
    (tmp_path / "config.json").write_text('{"model_type": "toy", "widht": 3}')
    with pytest.raises(UserError, match="widht: unknown key; did you mean 'width'"):
        weights.read_pretrained(tmp_path, ToyConfig, "toy")
    (tmp_path / "config.json").write_text('{"model_type": "toy"')
    with pytest.raises(UserError, match="cannot read it as JSON"):
        weights.read_pretrained(tmp_path, ToyConfig, "toy")
    (tmp_path / weights.INDEX_NAME).write_text('{"weight_map": {"a.bias": "../elsewhere.safetensors"}}')
    with pytest.raises(UserError, match="a shard must lie beside its index"):
        weights.read_state_dict(tmp_path)
    shard = next(tmp_path.glob("model-*.safetensors"))
    (tmp_path / weights.INDEX_NAME).write_text(json.dumps({"weight_map": {"nowhere": shard.name}}))
    with pytest.raises(UserError, match="nowhere not in the shard"):
        weights.read_state_dict(tmp_path)


def test_an_interrupted_save_leaves_a_directory_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.save_pretrained(tmp_path, ToyConfig(), toy_state(), "toy", max_shard_bytes=70)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        weights.save_pretrained(tmp_path, ToyConfig(), toy_state(), "toy", max_shard_bytes=70)
    with pytest.raises(UserError, match=r"no config\.json"):
        weights.read_pretrained(tmp_path, ToyConfig, "toy")


def test_half_a_download_is_told_as_such(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for length in (4, 1000, 20_000, len(data) // 2, len(data) - 1):
        (tmp_path / "half.pth").write_bytes(data[:length])
        with pytest.raises(UserError, match=r"half\.pth: damaged.*: its end is missing; copy or download it again"):
            weights.read_state_dict(tmp_path / "half.pth")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_numbers_of_another_kind_are_no_weights(dtype: torch.dtype) -> None:
    module = torch.nn.Linear(2, 2)
    state = module.state_dict() | {"weight": torch.ones(2, 2, dtype=dtype)}
    with pytest.raises(UserError, match=f"x: .*1 that are not of floating-point numbers: weight: {str(dtype)[6:]}"):
        weights.load_strict(module, state, "x")
    for fine in (torch.bfloat16, torch.float16, torch.float64):
        weights.load_strict(module, module.state_dict() | {"weight": torch.ones(2, 2, dtype=fine)}, "x")
