"""Programs that were written for the names of version 0.1 go on, with a warning."""

from __future__ import annotations

import importlib
import io
import itertools
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.data.images import image_batches, images_once
from mepa_ds.data.options import LoaderOptions
from mepa_ds.data.training import evaluation_batches, training_batches
from mepa_ds.distributed import Ranks
from mepa_ds.moved import NEW_NAMES
from mepa_ds.moved.names import NAMES
from tests.data.shard_fixtures import make_set
from tests.tiny_run import ROOT


@pytest.mark.parametrize("old", NEW_NAMES)
def test_an_old_name_is_the_same_module(old: str) -> None:
    sys.modules.pop(f"mepa_ds.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"mepa_ds.{old} is mepa_ds.{NEW_NAMES[old]} now"):
        module = importlib.import_module(f"mepa_ds.{old}")
    assert module is importlib.import_module(f"mepa_ds.{NEW_NAMES[old]}")
    assert module.__spec__ is not None
    assert module.__spec__.name == f"mepa_ds.{NEW_NAMES[old]}"


def test_python_runs_an_old_name(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("error: the cause\n")
    command = [sys.executable, "-m", "mepa_ds.slurm.cause", str(tmp_path / "log")]
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (end.returncode, end.stdout) == (0, "the cause\n"), end.stderr


def test_what_never_was_is_no_module() -> None:
    for name in ("loops.nothing", "nothing"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"mepa_ds.{name}")


def test_loaders_take_the_old_keywords(tmp_path: Path) -> None:
    tokens, images = tmp_path / "tokens", tmp_path / "images"
    make_set(tokens, "tokens", [4, 3])
    make_set(images, "images", [4, 3])
    ranks, options = Ranks(1, 2), LoaderOptions(num_workers=1, on_damaged="skip")
    old: dict[str, Any] = {"rank": 1, "world_size": 2, "num_workers": 1, "on_damaged": "skip"}
    with pytest.warns(DeprecationWarning, match="keywords are ranks and options now"):
        theirs = training_batches(tokens, None, global_batch=4, seed=1, **old)  # type: ignore[call-arg]
    ours = training_batches(tokens, None, global_batch=4, seed=1, ranks=ranks, options=options)
    assert [b.keys for b in itertools.islice(theirs, 3)] == [b.keys for b in itertools.islice(ours, 3)]
    with pytest.warns(DeprecationWarning, match="keywords are ranks and options now"):
        theirs = evaluation_batches(tokens, None, batch_size=2, rank=1, world_size=2)  # type: ignore[call-arg]
    assert [b.keys for b in theirs] == [b.keys for b in evaluation_batches(tokens, None, batch_size=2, ranks=ranks)]
    sizes: dict[str, Any] = {"batch_size": 2, "image_side": 8}
    with pytest.warns(DeprecationWarning, match="keywords are ranks and options now"):
        shuffled = image_batches(images, **sizes, on_damaged="skip", world_size=2)  # type: ignore[call-arg]
    assert next(shuffled).keys == next(image_batches(images, **sizes, ranks=Ranks(0, 2))).keys
    with pytest.warns(DeprecationWarning, match="keywords are ranks and options now"):
        once = image_batches(images, **sizes, train=False)  # type: ignore[call-arg]
    assert [b.keys for b in once] == [b.keys for b in images_once(images, **sizes)]
    with pytest.raises(TypeError, match="rank: ranks has it already"):
        training_batches(tokens, None, global_batch=4, seed=1, ranks=ranks, rank=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in NAMES for name in NAMES[module]])
def test_what_left_its_module_is_found_there(module: str, name: str) -> None:
    old = next((old for old, new in NEW_NAMES.items() if new == module), module)
    found = importlib.import_module(f"mepa_ds.{old}")
    with pytest.warns(DeprecationWarning, match=f"mepa_ds.{module}.{name} has moved"):
        assert callable(getattr(found, name))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        found.nonsense  # noqa: B018


def test_moved_functions_take_their_old_arguments(tmp_path: Path) -> None:
    source = tmp_path / "a.tar"
    with tarfile.open(source, "w") as tar:
        for name in ("0.png", "0.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"7"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        tar_module, index = (importlib.import_module(f"mepa_ds.data.{name}") for name in ("tar", "index"))
        table = tar_module.scan_tar(source)
        entry = index.ShardEntry(
            name="a.tar", num_samples=1, bytes=source.stat().st_size, sha256="", keys_sha256=index.keys_digest(table)
        )
        index.write_table(source, table, entry, {"png": index.Member()})
    assert index.read_offset_index(source, "images").key(0) == "0"
