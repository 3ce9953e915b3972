"""Weights from anybody: what they say of their sizes is held against their bytes before memory is taken."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mepa_ds.config.model import ModelConfig
from mepa_ds.errors import UserError
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.teachers.patch_pca import PatchPca
from mepa_ds.tokenizer.tokenizer import Tokenizer
from mepa_ds.weights.directories import load_strict, read_class_names, read_kind
from mepa_ds.weights.state_dict_files import read_checkpoint, read_state_dict
from mepa_ds.weights.state_dicts import Wanted, nests_of
from tests.tiny_run import make_tokenizer


def _header(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(**changes: Any) -> str:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}})


FOUR = bytes(4)
SAFETENSORS = {
    "longer than the file": _header(_entry(), FOUR, length=10**6),
    "longer than any": _header(_entry(), FOUR, length=2**63),
    "empty": b"",
    "cut": b"\x01\x00",
    "beyond the file": _header(_entry(shape=[10**9], data_offsets=[0, 4 * 10**9]), FOUR),
    "negative": _header(_entry(data_offsets=[-4, 0]), FOUR),
    "a product beyond 64 bits": _header(_entry(shape=[2**40, 2**40]), FOUR),
    "overlapping": _header(
        json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}), FOUR
    ),
    "an unknown type": _header(_entry(dtype="F1"), FOUR),
    "deep": _header("[" * 200_000),
    "a list": _header("[]"),
    "no text": _header(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_hostile_safetensors_file_is_one_message(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SAFETENSORS[name])
    with pytest.raises(UserError):
        read_state_dict(path)


def test_what_never_ends_is_no_file_of_weights(tmp_path: Path) -> None:
    for name in ("pipe.safetensors", "pipe.pth"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="not a regular file"):
            read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "x.bin", 7, None, ["a"], "a\nb"],
)
def test_an_index_names_plain_files_beside_it(shard: object, tmp_path: Path) -> None:
    (tmp_path / "outside.safetensors").write_bytes(save({"a": torch.ones(1)}))
    (inside := tmp_path / "inside").mkdir()
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match="beside its index"):
        read_state_dict(inside)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _bomb(value: Any) -> bytes:
    """The same archive, compressed."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(_saved(value))) as old,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return stream.getvalue()


def _nested(levels: int, times: int) -> Any:
    """Each list holds the next one many times: few bytes, and more paths than there are atoms."""
    inner: Any = [1]
    for _ in range(levels):
        inner = [inner] * times
    return inner


TORCH: dict[str, Callable[[], bytes]] = {
    "a view of terabytes": lambda: _saved({"a.b": torch.ones(1).expand(10**6, 10**6)}),
    "views of views": lambda: _saved({f"a.{n}": torch.ones(1).expand(2**16, 2**9) for n in range(9)}),
    "without values": lambda: _saved({"a.b": torch.ones(10**6, 10**6, device="meta")}),
    "sparse": lambda: _saved({"a.b": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), [1.0], (10**12,))}),
    "compressed": lambda: _bomb({"a.b": torch.zeros(1 << 24)}),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_hostile_file_of_torch_save_is_one_message(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(TORCH[name]())
    with pytest.raises(UserError) as refused:
        read_state_dict(path)
    assert len(str(refused.value)) < 1000


def test_lists_of_lists_are_looked_at_once(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    tree = {"a.b": torch.ones(1), "ema": _nested(6, 1000), **{f"ema_{n}": _nested(4, 500) for n in range(50)}}
    path.write_bytes(_saved(tree))
    started = time.process_time()
    state, _ = read_checkpoint(path, Wanted("something", ("a.b",)))
    assert list(state) == ["a.b"]
    assert time.process_time() - started < 10


def test_names_without_end_are_compared_in_bounded_time() -> None:
    started = time.process_time()
    state = {f"block.{number}.weight": torch.ones(1) for number in range(20_000)}
    with pytest.raises(UserError, match="20000 unexpected"):
        load_strict(torch.nn.Linear(1, 1), state, "here")
    many = {f"{'x.' * (number % 7)}{number}.a.b": torch.ones(1) for number in range(20_000)}
    read_state_dict(many, wanted=None)
    with pytest.raises(UserError) as refused:
        read_state_dict(
            {**many, **{f"{n}.a.b": torch.full((1,), n) for n in range(20_000)}}, wanted=Wanted("x", ("a.b",))
        )
    assert len(str(refused.value)) < 2000
    assert time.process_time() - started < 20
    assert nests_of(many)


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 10**6},
        {"depth": 10**12},
        {"width": 2**20},
        {"width": 2**62},
        {"codebook_size": 10**12},
        {"num_classes": 10**15},
        {"code_width": 10**12},
        {"scales": [1, 10**6]},
        {"scales": list(range(1, 100_000))},
        {"moe": {"num_experts": 10**9}},
        {"ffn_ratio": 1e300},
        {"depth": 10**200},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_config_beyond_its_weights_is_one_message(change: dict[str, Any], tmp_path: Path) -> None:
    config = ModelConfig(depth=2, width=32, num_heads=2, num_classes=3, scales=(1, 2), codebook_size=16, code_width=4)
    NextScaleTransformer(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    started = time.process_time()
    with pytest.raises(UserError) as refused:
        NextScaleTransformer.load(tmp_path)
    assert len(str(refused.value)) < 2000
    assert time.process_time() - started < 15


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 32 * 10**6},
        {"channel_multipliers": [1] * 10**5},
        {"channel_multipliers": [1, 10**15]},
        {"num_res_blocks": 10**8},
        {"num_phi": 10**8},
        {"codebook_size": 10**18},
        {"scales": [10**9]},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_tokenizers_config_too(change: dict[str, Any], tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    started = time.process_time()
    with pytest.raises(UserError):
        Tokenizer.load(tmp_path)
    assert time.process_time() - started < 15


def test_a_teachers_config_too(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save({"mean": torch.ones(1)}))
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "patch-pca", "grid_side": 10**6, "window": 10**6, "pixels_per_cell": 10**6, "width": 9}
        )
    )
    with pytest.raises(UserError, match="much larger"):
        PatchPca.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "1e999", '{"a": NaN}', "\ud800", '{"a": "\\ud800"}', "9" * 5000, ""]
)
def test_a_hostile_config_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    for read in (read_kind, read_class_names):
        with pytest.raises(UserError, match=r"config\.json"):
            read(tmp_path)
