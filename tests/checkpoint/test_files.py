"""What is in the way of checkpoints and exports, and cannot be removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.checkpoint import background_writer
from mepa_ds.checkpoint.files import checkpoint_name, clean, list_checkpoints, prune, publish, set_aside
from mepa_ds.files import make_way, remove
from mepa_ds.project.stages.run import Stage, StageRun


def directory(path: Path, content: str = "") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(content)
    return path


def names(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files that stay where they are, as NFS keeps those that are open elsewhere."""
    kept = set[str]()
    unlink = os.unlink

    def refuse(path: Any, *arguments: Any, **options: Any) -> None:
        if os.path.basename(path) in kept:
            raise OSError(16, "Device or resource busy", str(path))
        unlink(path, *arguments, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    return kept


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`best`, moved to another disk and linked: each export succeeds, and the first says what became of the link."""
    run, far = tmp_path / "run", directory(tmp_path / "far", "old")
    run.mkdir()
    (run / "best").symlink_to(far)
    for number in range(3):
        publish(directory(run / ".best.tmp", f"new {number}"), run / "best")
        assert (run / "best/config.json").read_text() == f"new {number}"
        assert names(run) == ["best"]
    assert (far / "config.json").read_text() == "old"
    assert capsys.readouterr().err == (
        f"warning: {run}/best was a link to {far}, and is a directory now; what the link led to stays as it was\n"
    )


def test_anything_may_have_the_name_of_an_export(tmp_path: Path) -> None:
    """A link goes; a file is somebody's, and stays."""
    (tmp_path / "best").symlink_to(tmp_path / "nowhere")
    (tmp_path / "last").write_text("a file")
    (tmp_path / ".best.old").write_text("a file")
    (tmp_path / ".last.old").symlink_to(tmp_path / "nowhere")
    publish(directory(tmp_path / ".best.tmp"), tmp_path / "best")
    with pytest.raises(FileExistsError, match="no run has written it"):
        publish(directory(tmp_path / ".last.tmp"), tmp_path / "last")
    (tmp_path / "last").unlink()
    publish(tmp_path / ".last.tmp", tmp_path / "last")
    assert names(tmp_path) == [".best.old.foreign1", "best", "last"]


def test_what_cannot_be_removed_is_moved_out_of_the_way(
    tmp_path: Path, busy: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An export that is open elsewhere leaves files behind, one after the other."""
    busy.add(".nfs0001")
    for number in range(4):
        new = directory(tmp_path / ".best.tmp", str(number))
        (new / ".nfs0001").write_text("")
        publish(new, tmp_path / "best")
        assert (tmp_path / "best/config.json").read_text() == str(number)
    assert names(tmp_path) == [".best.old", ".best.old.left1", ".best.old.left2", "best"]
    said = capsys.readouterr().err
    assert said.count("could not be removed, and is out of the way now") == said.count("\n") == 2
    clean(tmp_path)
    clean(tmp_path)
    assert names(tmp_path) == [".best.old", ".best.old.left1", ".best.old.left2", "best"]
    said = capsys.readouterr().err
    assert said.count("a leftover, cannot be removed") == said.count("\n") == 3, "each once"
    busy.clear()
    clean(tmp_path)
    assert names(tmp_path) == ["best"]


def test_old_checkpoints_that_cannot_go_spoil_no_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    far = directory(tmp_path / "far")
    checkpoints = tmp_path / "checkpoints"
    for step in (4, 6, 8):
        directory(checkpoints / checkpoint_name(step))
    (checkpoints / checkpoint_name(2)).symlink_to(far)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name == checkpoint_name(4):
            raise OSError(13, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    for _ in range(2):
        prune(checkpoints, keep=1, keep_every=None)
        assert names(checkpoints) == [checkpoint_name(4), checkpoint_name(8)]
    assert names(far) == ["config.json"]
    assert capsys.readouterr().err.count("cannot be deleted (Permission denied)") == 1


def test_a_damaged_checkpoint_is_set_aside_whatever_lies_there(tmp_path: Path, busy: set[str]) -> None:
    busy.add(".nfs0001")
    for _ in range(2):
        (directory(tmp_path / checkpoint_name(2)) / ".nfs0001").write_text("")
        set_aside(tmp_path / checkpoint_name(2))
    assert list_checkpoints(tmp_path) == []
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["file", "link", "directory", "nothing"])
def test_whatever_is_in_the_way_goes(tmp_path: Path, kind: str) -> None:
    far, path = directory(tmp_path / "far"), tmp_path / "run/tmp"
    path.parent.mkdir()
    if kind == "file":
        path.write_text("")
    elif kind == "link":
        path.symlink_to(far)
    elif kind == "directory":
        shutil.copytree(far, path / "deep")
    assert remove(path)
    make_way(path)
    background_writer._make_anew(path)
    assert path.is_dir()
    assert not names(path)
    assert names(far) == ["config.json"]


def test_the_quickstart_starts_anew_through_links(tmp_path: Path) -> None:
    far = directory(tmp_path / "far")
    stage = Stage("a", "b", (), (tmp_path / "out", tmp_path / "none"), ())
    (tmp_path / "out").symlink_to(far)
    StageRun([stage], tmp_path / "progress.json", "quickstart")._forget([stage])
    assert names(tmp_path) == ["far"]
    assert names(far) == ["config.json"]
