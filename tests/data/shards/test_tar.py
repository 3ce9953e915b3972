"""Tars by offset, against Python's tarfile: headers of all types, in all formats, however they are padded."""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.offset_index import scan_tar
from mepa_ds.data.shards.tar import DEAD_LINKS, DEVICES, UNKNOWN_KINDS, TarMember, list_members
from mepa_ds.data_tools.readers.imagenet import ImageNet
from mepa_ds.data_tools.readers.webdataset import WebDataset
from mepa_ds.errors import DamagedError
from tests.data.shard_fixtures import make_set
from tests.data.shards.tar_fixtures import add, listed

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=130).filter(
    lambda name: name not in (".", "..") and not name.startswith("/") and len(name.encode()) < 250
)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(members=st.lists(st.tuples(names, st.binary(max_size=1500)), min_size=1, max_size=6))
def test_members_are_where_tarfile_says(
    tmp_path_factory: pytest.TempPathFactory, format: int, members: list[tuple[str, bytes]]
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    written = []
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            try:
                add(tar, name, data)
            except ValueError:  # ustar cannot hold the name
                continue
            written.append((name, data))
    assert listed(path) == (written, {})


FILES = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE]
LINKS = [tarfile.LNKTYPE, tarfile.SYMTYPE]
WITHOUT_DATA = [tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
folders = st.sampled_from(["", "./", "d/", "d/e/", f"{'long' * 40}/"])
items = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([*FILES, *FILES, *LINKS, *LINKS, *WITHOUT_DATA, b"A", b"Z", b"N"]),
        "folder": folders,
        "data": st.binary(min_size=1, max_size=1100),
        "target": st.integers(0, 9),
        "size": st.sampled_from([0, 1, 512, 4096, 777]),  # of what has no data, in its header
        "pax": st.dictionaries(st.sampled_from(["comment", "mtime", "uname"]), st.sampled_from(["1", "é"]), max_size=2),
    }
)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    archives=st.lists(st.lists(items, min_size=1, max_size=5), min_size=1, max_size=3),
    common=st.dictionaries(st.just("comment"), st.just("global"), max_size=1),
    zeros=st.integers(0, 5),
)
def test_all_types_of_members_in_build_and_scan(
    tmp_path_factory: pytest.TempPathFactory,
    format: int,
    archives: list[list[dict[str, Any]]],
    common: dict[str, str],
    zeros: int,
) -> None:
    """Archives joined by cat, with links, devices, folders and unknown types; sizes where no data are."""
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    names: list[str] = []
    content = b"".join(_archive(archive, names, format, common) + bytes(512 * zeros) for archive in archives)
    path.write_bytes(content)
    expected, expected_left_out = _by_tarfile(path)
    assert listed(path) == (expected, expected_left_out)
    images = [(name, data) for name, data in expected if name.endswith(".jpg")]

    left_out, offset_index = LeftOut(), scan_tar(path, "images")
    members = list_members(path, left_out)
    places = {(offset, size) for name, offset, size in members if name.endswith(".jpg")}
    scanned = (
        set(zip(offset_index.offsets_NM[:, 0].tolist(), offset_index.sizes_NM[:, 0].tolist(), strict=True))
        if images
        else set()
    )
    assert (len(offset_index), scanned) == (len(images), places)
    assert {reason: count for reason, count in offset_index.left_out.counts.items() if reason in left_out.counts} == (
        left_out.counts
    )

    source = WebDataset(str(path)).open(None)
    assert sorted(source.load(number)[1] for number in range(len(source))) == sorted(data for _, data in images)
    if images:
        with tarfile.open(path.with_name("train.tar"), "w") as outer:
            add(outer, "n00000001.tar", content)
        source = ImageNet(path.with_name("train.tar")).open(None)
        assert [source.load(number)[1] for number in range(len(source))] == [data for _, data in images]


def _archive(archive: list[dict[str, Any]], names: list[str], format: int, common: dict[str, str]) -> bytes:
    """Members `0.jpg`, `1.jpg`... of all archives, each with its label. `names` grows by them."""
    buffer = io.BytesIO()
    pax_headers = common if format == tarfile.PAX_FORMAT else {}
    with tarfile.open(fileobj=buffer, mode="w", format=format, pax_headers=pax_headers) as tar:
        for item in archive:
            name, kind = f"{item['folder']}{len(names)}.jpg", item["kind"]
            fields = {"type": kind, "pax_headers": item["pax"] if format == tarfile.PAX_FORMAT else {}}
            data = b"" if kind in (*LINKS, *WITHOUT_DATA) else item["data"]
            if not data:
                fields["size"] = item["size"]
            if kind in LINKS:
                target = names[item["target"] % len(names)] if names and item["target"] < 7 else "d/nowhere.jpg"
                up = "../" * item["folder"].replace("./", "").count("/") if kind == tarfile.SYMTYPE else ""
                fields["linkname"] = up + target
            try:
                add(tar, name, data, **fields)
            except ValueError:  # ustar cannot hold the name
                continue
            add(tar, f"{item['folder']}{len(names)}.cls", b"0")
            names.append(name)
    return buffer.getvalue()


def _by_tarfile(path: Path) -> tuple[list[tuple[str, bytes]], dict[str, int]]:
    found, left_out = [], dict[str, int]()
    with tarfile.open(path, ignore_zeros=True) as tar:
        for member in tar:
            file = _followed(tar, member)
            if file is not None:
                data = tar.extractfile(file)
                assert data is not None
                found.append((member.name, data.read()))
            elif not member.isdir():
                is_link = member.islnk() or member.issym()
                reason = DEAD_LINKS if is_link else DEVICES if member.isdev() else UNKNOWN_KINDS
                left_out[reason] = left_out.get(reason, 0) + 1
    return found, left_out


def _followed(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The file that a link leads to in the end."""
    for _ in range(40):
        if not (member.islnk() or member.issym()):
            return member if member.isreg() else None
        try:
            member = tar._find_link_target(member)  # type: ignore[attr-defined]
        except KeyError:
            return None
    return None


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 14 * 512 - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_damage_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    """Whatever stands in a header, with the checksum made right again: no other exception, no place outside."""
    path = tmp_path_factory.getbasetemp() / "changed.tar"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "é"}) as tar:
        add(tar, "d", type=tarfile.DIRTYPE)
        add(tar, "x.jpg", b"a" * 700, pax_headers={"path": "y.jpg", "size": "700"})
        add(tar, "x.png", type=tarfile.LNKTYPE, linkname="y.jpg", size=700)
    content = bytearray(buffer.getvalue())
    for place, value in changes:
        content[place] = value
    for start in range(0, len(content), 512):
        header = content[start : start + 512]
        if header[257:262] == b"ustar":
            content[start + 148 : start + 156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(content)
    members: list[TarMember] = []
    with suppress(DamagedError):
        members = list_members(path, LeftOut())
        scan_tar(path, "images")
    assert all(0 <= offset <= offset + size <= len(content) for _, offset, size in members)


def test_our_tars_are_read_by_tarfile_and_webdataset(tmp_path: Path) -> None:
    make_set(tmp_path, "tokens", [3])
    path = tmp_path / "shard-000000.tar"
    with tarfile.open(path) as tar:
        assert tar.getnames()[:2] == ["000000000.tokens.npy", "000000000.cls"]
    samples = list(wds.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000001", "000000002"]
    assert samples[2]["tokens.npy"].tolist() == [2, 0, 1, 2, 3]
    assert samples[2]["cls"] == 2


def write_tar(path: Path, names: list[str]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name in names:
            add(tar, name, b"x" * 700)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg"])
def test_names_that_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", [name])
    with pytest.raises(DamagedError, match="unsafe path"):
        scan_tar(tmp_path / "a.tar", "images")


def test_a_truncated_tar_is_named_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    content = write_tar(path, ["a.jpg", "b.jpg"])
    for length in (600, 512 + 700, 1536, 1536 + 100, 3072):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedError, match=r"a\.tar: truncated"):
            scan_tar(path, "images")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"hello" * 300, "no tar header"), (b"\x1f\x8b" * 999, "compressed")],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DamagedError, match=message):
        list_members(tmp_path / "a.tar", LeftOut())


def test_a_flipped_header_bit_is_found(tmp_path: Path) -> None:
    content = bytearray(write_tar(tmp_path / "a.tar", ["a.jpg", "b.jpg"]))
    content[1536 + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DamagedError, match="no tar header at byte 1536"):
        scan_tar(tmp_path / "a.tar", "images")


def test_a_tar_within_a_tar_ends_where_it_ends(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", ["a.jpg"])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "inner.tar", inner)
        add(tar, "b.jpg", b"b")
    outer = list_members(tmp_path / "a.tar", LeftOut())
    assert list_members(tmp_path / "a.tar", LeftOut(), outer[0].offset, outer[0].size) == [
        TarMember("a.jpg", outer[0].offset + 512, 700)
    ]
