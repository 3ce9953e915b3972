"""Copies of shard sets on a node's disk, where everybody may write."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from multiprocessing import get_context
from pathlib import Path

import pytest

from mepa_ds.errors import UserError
from mepa_ds.slurm.in_job import node_copies
from mepa_ds.slurm.in_job.node_copies import copy_set, sets_to_copy


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    source = tmp_path / "set"
    source.mkdir()
    (source / "a.tar").write_bytes(b"good")
    (source / "a.idx.npz").write_bytes(b"index")
    entry = {"name": "a.tar", "sha256": hashlib.sha256(b"good").hexdigest()}
    (source / "index.json").write_text(json.dumps({"shards": [entry]}))
    path = tmp_path / "r.yaml"
    path.write_text(f"output_dir: {tmp_path}/run\ndata:\n  tokens: {source}\n")
    return path


def place(recipe: Path) -> tuple[Path, Path]:
    ((_, source, target),) = sets_to_copy(recipe.parent / "local", recipe, ())
    return source, target


def test_only_the_user_reads_the_copies(recipe: Path) -> None:
    source, target = place(recipe)
    assert copy_set(source, target) > 0
    own = recipe.parent / "local" / f"mepa_ds-{os.getuid()}"
    for path in (own, *own.rglob("*")):
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0 or path.name.endswith(".copied.json"), path
    assert copy_set(source, target) == 0


@pytest.mark.parametrize("name", ["a.tar", "a.idx.npz"])
def test_a_copy_that_was_changed_is_made_again(recipe: Path, name: str) -> None:
    source, target = place(recipe)
    copy_set(source, target)
    whole = (target / name).read_bytes()
    (target / name).write_bytes(b"x" * len(whole))
    assert copy_set(source, target) > 0
    assert (target / name).read_bytes() == whole
    (target / name).unlink()
    (target / name).symlink_to(source / name)
    assert copy_set(source, target) > 0
    assert not (target / name).is_symlink()
    (target / "planted.tar").write_bytes(b"evil")
    assert copy_set(source, target) > 0
    assert not (target / "planted.tar").exists()


def test_links_and_devices_of_a_set_are_not_copied(recipe: Path) -> None:
    source, target = place(recipe)
    (recipe.parent / "id_rsa").write_text("private")
    (source / "key").symlink_to(recipe.parent / "id_rsa")
    os.mkfifo(source / "pipe")
    copy_set(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["a.idx.npz", "a.tar", "index.json"]
    (source / "a.tar").unlink()
    (source / "a.tar").symlink_to(recipe.parent / "id_rsa")
    with pytest.raises(UserError, match=r"a\.tar is a link"):
        copy_set(source, target)


def test_a_shard_that_is_not_the_indexed_one_is_not_copied(recipe: Path) -> None:
    source, target = place(recipe)
    (source / "a.tar").write_bytes(b"evil")
    with pytest.raises(UserError, match=r"is not the file that index\.json describes"):
        copy_set(source, target)
    assert not target.exists()


def test_the_lock_is_no_link_that_is_followed(recipe: Path) -> None:
    source, target = place(recipe)
    victim = recipe.parent / "thesis.tex"
    victim.write_text("years of work")
    copy_set(source, target)
    (target.parent / ".lock").unlink()
    (target.parent / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        copy_set(source, target)
    assert victim.read_text() == "years of work"


def test_a_directory_of_another_user_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = place(recipe)
    target.parents[2].mkdir(parents=True)
    monkeypatch.setattr("mepa_ds.safety.places.os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match=r"MEPA_SCRATCH: .* is a directory of another user"):
        copy_set(source, target)


def test_every_user_has_a_place(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = place(recipe)
    monkeypatch.setattr(node_copies.os, "getuid", lambda: 4711)
    _, second = place(recipe)
    assert first.parents[2] != second.parents[2]


def test_names_that_a_shell_would_split_are_refused(recipe: Path) -> None:
    odd = recipe.parent / "a\nb=c"
    (recipe.parent / "set").rename(odd)
    with pytest.raises(UserError, match="line break"):
        list(sets_to_copy(recipe.parent, recipe, [f"data.tokens={json.dumps(str(odd))}"]))


def stage_as(user: int, source: Path, target: Path) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    copy_set(source, target)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_users_stage_on_one_node() -> None:
    """Really two, each of them in a process without root's rights."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        scratch = folder / "local"
        scratch.mkdir()
        scratch.chmod(0o1777)
        for user in (12001, 12002, 12001):
            source = folder / f"set{user}"
            source.mkdir(exist_ok=True)
            (source / "index.json").write_text(json.dumps({"shards": [], "of": user}))
            own = scratch / f"mepa_ds-{user}"
            target = own / "shards" / "0" / source.name
            process = get_context("fork").Process(target=stage_as, args=(user, source, target))
            process.start()
            process.join(60)
            assert process.exitcode == 0
            assert (target / "index.json").exists()
            assert (own.stat().st_uid, stat.S_IMODE(own.stat().st_mode)) == (user, 0o700)
