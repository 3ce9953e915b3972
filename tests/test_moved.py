"""Programs that were written for the names of version 0.1 go on, with a warning."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.data.images import image_batches, images_once
from mepa_ds.data.options import LoaderOptions
from mepa_ds.data.training import evaluation_batches, training_batches
from mepa_ds.distributed import Ranks
from mepa_ds.moved import NEW_NAMES
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
