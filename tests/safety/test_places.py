"""Places that others may reach: no link is followed, and nobody else's directory is used."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path, check_writable, read_file, write_text
from mepa_ds.safety.places import (
    is_own_file,
    make_new,
    open_lock,
    open_no_link,
    open_to_append,
    private_directory,
    temporary_name,
    user_directory,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
_NOBODY = 65534


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "thesis.tex"
    path.write_text("years of work")
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_directory(tmp_path: Path) -> None:
    path = private_directory(tmp_path / "a" / "own", "cache")
    assert mode_of(path) == 0o700
    path.chmod(0o755)
    assert mode_of(private_directory(path, "cache")) == 0o700  # of an earlier version, say


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "anothers"])
def test_what_is_not_ours_is_refused(tmp_path: Path, kind: str) -> None:
    path, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
    if kind == "link":
        elsewhere.mkdir()
    if kind in ("link", "dangling"):
        path.symlink_to(elsewhere)
    elif kind == "file":
        path.write_text("")
    else:
        if os.geteuid() != 0:
            pytest.skip("only root can give directories away")
        path.mkdir()
        os.chown(path, _NOBODY, _NOBODY)
    with pytest.raises(UserError, match=r"cache: .*own is .*; remove it, or give another place"):
        private_directory(path, "cache")
    assert not elsewhere.exists() or not any(elsewhere.iterdir())


def test_each_user_has_a_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = user_directory("compiled")
    assert path == tmp_path / f"mepa_ds-{os.getuid()}" / "compiled"
    assert mode_of(path) == mode_of(path.parent) == 0o700


def test_temporary_names_cannot_be_foretold(tmp_path: Path) -> None:
    names = {temporary_name(tmp_path / "status.json") for _ in range(100)}
    assert len(names) == 100
    assert all(name.name.startswith(".status.json.") and name.suffix == ".tmp" for name in names)


def test_atomic_files_replace_a_link(tmp_path: Path, victim: Path) -> None:
    path = tmp_path / "status.json"
    path.symlink_to(victim)
    write_text(path, "{}")
    assert not path.is_symlink()
    assert (path.read_text(), victim.read_text()) == ("{}", "years of work")


def test_temporary_files_of_others_are_not_opened(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if somebody had foretold the name."""
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * size)
    temporary_name(tmp_path / "a").symlink_to(victim)
    temporary_name(tmp_path / "probe").symlink_to(victim)
    with pytest.raises(FileExistsError), atomic_path(tmp_path / "a"):
        pass
    with pytest.raises(UserError, match="cannot write there"):
        check_writable(tmp_path, "output_dir")
    assert victim.read_text() == "years of work"


def test_links_and_devices_are_not_opened(tmp_path: Path, victim: Path) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(victim)
    os.mkfifo(pipe)
    for path in (link, pipe, Path("/dev/zero")):
        with pytest.raises(OSError, match=r"symbolic links|not a regular file"):
            open_no_link(path, os.O_RDONLY)
    with pytest.raises(OSError, match="symbolic links"):
        open_lock(link)
    with pytest.raises(FileExistsError):
        make_new(link)
    assert victim.read_text() == "years of work"


def test_a_lock_keeps_what_is_in_it(tmp_path: Path) -> None:
    for _ in range(2):
        with open_lock(tmp_path / ".lock") as file:
            file.seek(0, os.SEEK_END)
            file.write(b"x")
    assert (tmp_path / ".lock").read_bytes() == b"xx"
    assert mode_of(tmp_path / ".lock") == 0o600


def test_a_log_replaces_a_link(tmp_path: Path, victim: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to(victim)
    for _ in range(2):
        with open_to_append(path) as file:
            file.write(b"{}\n")
    assert (path.read_bytes(), victim.read_text()) == (b"{}\n{}\n", "years of work")
    with pytest.raises(OSError, match="not a regular file"):
        open_to_append(Path("/dev/full"))


@needs_root
def test_whose_file_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("")
    with open(path) as file:
        assert is_own_file(file.fileno())
        path.chmod(0o666)
        assert not is_own_file(file.fileno())
        path.chmod(0o600)
        os.chown(path, _NOBODY, _NOBODY)
        assert not is_own_file(file.fileno())


def test_files_are_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(10))
    assert read_file(path, most_bytes=10) == bytes(10)
    with pytest.raises(ValueError, match="has 10 bytes, more than the 9"):
        read_file(path, most_bytes=9)
    with pytest.raises(OSError, match="not a regular file"):
        read_file(Path("/dev/zero"), most_bytes=9)
