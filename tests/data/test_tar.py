"""Tars by offset, against Python's tarfile."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from mepa_ds.data.tar import DamagedError, iterate_members, scan_tar, split_member_name
from tests.data.shard_fixtures import make_set

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=130).filter(
    lambda name: name not in (".", "..") and not name.startswith("/") and len(name.encode()) < 250
)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(max_examples=25, deadline=None)
@given(members=st.lists(st.tuples(names, st.binary(max_size=1500)), min_size=1, max_size=6))
def test_members_are_where_tarfile_says(
    tmp_path_factory: pytest.TempPathFactory, format: int, members: list[tuple[str, bytes]]
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    written = []
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # ustar cannot hold the name
                continue
            written.append((name, data))
    content = path.read_bytes()
    found = [(name, content[offset : offset + size]) for name, offset, size in iterate_members(path)]
    assert found == written


def test_our_tars_are_read_by_tarfile_and_webdataset(tmp_path: Path) -> None:
    make_set(tmp_path, "tokens", [3])
    path = tmp_path / "shard-000000.tar"
    with tarfile.open(path) as tar:
        assert tar.getnames()[:2] == ["000000000.tokens.npy", "000000000.cls"]
    samples = list(wds.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000001", "000000002"]
    assert samples[2]["tokens.npy"].tolist() == [2, 0, 1, 2, 3]
    assert samples[2]["cls"] == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.c/000.x.JPG", ("a/b.c/000", "x.jpg")),
        ("000.jpg", ("000", "jpg")),
        ("plain", ("plain", "")),
    ],
)
def test_keys_end_at_the_first_dot_of_the_file_name(name: str, expected: tuple[str, str]) -> None:
    assert split_member_name(name) == expected


def write_tar(path: Path, names: list[str]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(b"x" * 700))
    return path.read_bytes()


def test_samples_that_cannot_be_told_apart(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ["x.jpg", "y.jpg", "x.cls"])
    with pytest.raises(DamagedError, match="members of sample 'x' do not lie side by side; make the shard again"):
        scan_tar(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("caf\xe9.jpg"))
    with pytest.raises(DamagedError, match=r"member 'caf.*udce9\.jpg' is not UTF-8; .*build_shards\.py webdataset"):
        scan_tar(tmp_path / "b.tar")


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg"])
def test_names_that_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", [name])
    with pytest.raises(DamagedError, match="unsafe path"):
        scan_tar(tmp_path / "a.tar")


def test_a_truncated_tar_is_named_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    content = write_tar(path, ["a.jpg", "b.jpg"])
    for length in (600, 512 + 700, 1536, 1536 + 100, 3072):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedError, match=r"a\.tar: truncated"):
            scan_tar(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"hello" * 300, "no tar header"), (b"\x1f\x8b" * 999, "compressed")],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DamagedError, match=message):
        scan_tar(tmp_path / "a.tar")


def test_a_flipped_header_bit_is_found(tmp_path: Path) -> None:
    content = bytearray(write_tar(tmp_path / "a.tar", ["a.jpg", "b.jpg"]))
    content[1536 + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DamagedError, match="no tar header at byte 1536"):
        scan_tar(tmp_path / "a.tar")


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ["a.jpg", "a.jpg"])
    with pytest.raises(DamagedError, match=r"'a' has two members \.jpg"):
        scan_tar(tmp_path / "a.tar")
