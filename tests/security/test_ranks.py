"""Between ranks: no pickles of ours. And what compilers keep: nowhere that others may write."""

from __future__ import annotations

import os
import re
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mepa_ds import distributed
from mepa_ds.engine.compilation import compile_blocks
from mepa_ds.errors import UserError
from mepa_ds.safety import compilers
from tests.tiny_run import ROOT

CONTEXT = torch.multiprocessing.get_context("spawn")
VALUES: list[Any] = [None, True, 3, 1.5, "né\n", [1, ["a"]], {"a": {"b": [None]}}, [], ""]


def _exchange(rank: int, place: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found: list[Any] = [distributed.of_main(value if rank == 0 else None) for value in VALUES]
    found += [distributed.of_all([rank] * (rank * 50))]
    mine = {"w": torch.full((rank, 2), 1.5, dtype=torch.bfloat16), "n": torch.tensor(rank), "z": torch.ones(3) > 0}
    tensors = distributed.tensors_of_all(mine if rank else {})
    found += [[{name: [str(t.dtype), t.tolist()] for name, t in one.items()} for one in tensors]]
    try:
        distributed.agree(UserError("gone") if rank else None)
    except UserError as error:
        found.append(str(error))
    results.put(found)
    dist.destroy_process_group()


def test_ranks_tell_each_other_what_json_can_say(tmp_path: Path) -> None:
    results = CONTEXT.Queue()
    ranks = [CONTEXT.Process(target=_exchange, args=(rank, f"file://{tmp_path}/store", results)) for rank in range(2)]
    for process in ranks:
        process.start()
    first, second = (results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    assert first == second
    assert first[: len(VALUES)] == VALUES
    assert first[len(VALUES)] == [[], [1] * 50]
    assert first[-2] == [
        {},
        {"w": ["torch.bfloat16", [[1.5, 1.5]]], "n": ["torch.int64", 1], "z": ["torch.bool", [True] * 3]},
    ]
    assert first[-1] == "rank 1: gone"


def test_no_module_sends_objects() -> None:
    """PyTorch's collectives of objects unpickle what comes from the network."""
    word = re.compile(
        r"\b(?:broadcast_object_list|all_gather_object|gather_object|scatter_object_list|pickle\.loads?)\b"
    )
    paths = [path for folder in ("mepa_ds", "slurm") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    assert [path for path in paths if word.search(path.read_text())] == []


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory in which another user was first."""
    for variable in compilers._PLACES:
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_compiled_code_is_kept_in_a_private_place(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    model = nn.Module()
    model.blocks = nn.ModuleList()
    compile_blocks(model)  # type: ignore[arg-type]
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        place = Path(os.environ[variable])
        assert place.parent == shared / f"mepa_ds-{os.getuid()}"
        assert place.stat().st_mode & 0o077 == place.parent.stat().st_mode & 0o077 == 0
        assert place.stat().st_uid == os.getuid()


def test_a_place_that_another_user_made_is_refused(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shared / "elsewhere").mkdir()
    (shared / f"mepa_ds-{os.getuid()}").symlink_to(shared / "elsewhere")
    with pytest.raises(UserError, match="TMPDIR"):
        compilers.keep_compiled_code_private()
    assert os.listdir(shared / "elsewhere") == []
