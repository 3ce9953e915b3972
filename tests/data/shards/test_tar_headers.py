"""Headers that tarfile does not write, byte by byte: other writers' sizes, names, types and ends."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.tar import BEHIND_THE_END, DEAD_LINKS, list_members
from mepa_ds.errors import DamagedError
from tests.data.shards.tar_fixtures import END, add, block, listed, padded, pax

USTAR, GNU = b"ustar\x0000", b"ustar  \0"
FILE = block("a.jpg", b"00000000003\0") + padded(b"abc")
OTHER = block("b.jpg", b"00000000002\0") + padded(b"de")
BOTH = [("a.jpg", b"abc"), ("b.jpg", b"de")]


def base_256(size: int) -> bytes:
    return bytes([0x80]) + size.to_bytes(11, "big")


@pytest.mark.parametrize(
    "content",
    [
        block("a.jpg", b"3           ") + padded(b"abc"),
        block("a.jpg", b"         3 \0") + padded(b"abc"),
        block("a.jpg", base_256(3)) + padded(b"abc"),
        block("a.jpg", b"00000000003\0", b"\0") + padded(b"abc"),  # V7, no magic
        block("a.jpg", b"00000000003\0", magic=GNU, prefix=b"12345670123\0") + padded(b"abc"),  # an access time
        block("././@LongLink", b"00000000006\0", b"L", magic=GNU) + padded(b"a.jpg\0") + block("cut", base_256(3))
        + padded(b"abc"),
        pax(b"x", b"path=a.jpg", b"size=3", b"comment=\xff") + block("cut") + padded(b"abc"),
        pax(b"X", b"path=a.jpg") + block("cut", b"3\0") + padded(b"abc"),  # Solaris
    ],
)  # fmt: skip
def test_names_and_sizes_of_other_writers(tmp_path: Path, content: bytes) -> None:
    assert listed(tmp_path / "a.tar", content + OTHER + END) == (BOTH, {})


def test_a_checksum_of_signed_bytes(tmp_path: Path) -> None:
    header = bytearray(block("caf\xe9.jpg", b"00000000003\0"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % (sum(header) - 256 * sum(byte > 127 for byte in header))
    assert listed(tmp_path / "a.tar", bytes(header) + padded(b"abc") + END)[0] == [("caf\xe9.jpg", b"abc")]


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"V", b"D"])
@pytest.mark.parametrize("size", [b"00000001000\0", b"00000010000\0", b"77777777777\0", base_256(1 << 60), bytes(12)])
@pytest.mark.parametrize("follower", [OTHER + END, END])
def test_sizes_of_what_has_no_data(tmp_path: Path, kind: bytes, size: bytes, follower: bytes) -> None:
    """4096 bytes of a folder are those that it takes on its disk; a volume label's field may be empty."""
    content = FILE + block("x", size, kind, magic=USTAR, target=b"a.jpg")
    files = [("a.jpg", b"abc"), *([("x", b"abc")] if kind in (b"1", b"2") else []), *BOTH[1:]]
    assert listed(tmp_path / "a.tar", content + follower)[0] == (files if follower != END else files[:-1])


def test_data_behind_what_needs_none(tmp_path: Path) -> None:
    """PAX allows a hard link's data behind it, GNU tar's incremental archives hold the names in a folder."""
    link = block("x.jpg", b"00000000004\0", b"1", target=b"a.jpg") + padded(b"same")
    folder = block("d/", b"00000000006\0", b"D") + padded(b"Ya\0Nb\0")
    assert listed(tmp_path / "a.tar", FILE + link + folder + OTHER + END)[0] == [
        BOTH[0],
        ("x.jpg", b"same"),
        BOTH[1],
    ]


def test_headers_for_all_that_follows(tmp_path: Path) -> None:
    """Sizes and paths too; an own record counts for one member, an empty one takes the common one back."""
    common = pax(b"g", b"size=3", b"path=g.jpg", b"comment=x")
    members = [
        block("1") + padded(b"abc"),
        pax(b"x", b"size=2", b"path=own.jpg") + block("2") + padded(b"de"),
        block("3") + padded(b"fgh"),
        pax(b"x", b"path=", b"size=") + block("4.jpg", b"1\0") + padded(b"i"),
    ]
    expected = [("g.jpg", b"abc"), ("own.jpg", b"de"), ("g.jpg", b"fgh"), ("4.jpg", b"i")]
    assert listed(tmp_path / "a.tar", common + b"".join(members) + END)[0] == expected
    # In archives joined by cat, each has its own.
    assert listed(tmp_path / "a.tar", common + members[0] + END + FILE + END)[0] == [expected[0], BOTH[0]]


@pytest.mark.parametrize("between", [bytes(512), END, bytes(10240)])
@pytest.mark.parametrize("behind", [b"", bytes(512), bytes(100), bytes(3 << 20)])
def test_archives_joined_by_cat(tmp_path: Path, between: bytes, behind: bytes) -> None:
    assert listed(tmp_path / "a.tar", FILE + between + OTHER + END + behind) == (BOTH, {})


@pytest.mark.parametrize("garbage", [b"x", b"tail" * 300, bytes(2000) + b"x"])
def test_data_behind_the_end_are_counted(tmp_path: Path, garbage: bytes) -> None:
    left_out = LeftOut()
    (tmp_path / "a.tar").write_bytes(FILE + END + garbage)
    assert [member.name for member in list_members(tmp_path / "a.tar", left_out)] == ["a.jpg"]
    assert left_out.counts == {BEHIND_THE_END: 1}
    assert "bytes at the end of" in str(left_out)


def test_links_are_followed_and_dead_ones_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "d/late.jpg", type=tarfile.SYMTYPE, linkname="../e/x.jpg")  # before its target
        add(tar, "./e/x.jpg", b"xx")
        add(tar, "hard.jpg", type=tarfile.LNKTYPE, linkname="e/x.jpg")
        add(tar, "./e/x.jpg", type=tarfile.LNKTYPE, linkname="./e/x.jpg")  # tar c f f: one file
        add(tar, "two.jpg", type=tarfile.LNKTYPE, linkname="d/late.jpg")
        add(tar, "n" * 120 + ".jpg", type=tarfile.SYMTYPE, linkname="./" * 60 + "two.jpg")
        for name, target in (("round.jpg", "round2.jpg"), ("round2.jpg", "round.jpg"), ("up.jpg", "../e/x.jpg")):
            add(tar, name, type=tarfile.SYMTYPE, linkname=target)
        add(tar, "absolute.jpg", type=tarfile.SYMTYPE, linkname="/e/x.jpg")
    names = ["d/late.jpg", "./e/x.jpg", "hard.jpg", "two.jpg", "n" * 120 + ".jpg"]
    assert listed(tmp_path / "a.tar") == ([(name, b"xx") for name in names], {DEAD_LINKS: 4})
    left_out = LeftOut()
    list_members(tmp_path / "a.tar", left_out)
    assert "4 links to what is not in the tar (round.jpg -> round2.jpg, " in str(left_out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (block("a.jpg", bytes([0xFF]) * 12) + END, "no tar header at byte 0: a negative number"),
        (block("a.jpg", b"-0000000003\0") + END, "no tar header at byte 0: b'-0000000003' is no octal number"),
        (block("a.jpg", b"1_0\0") + END, "is no octal number"),
        (block("a.jpg", base_256(1 << 70)) + END, "truncated inside member 'a.jpg'"),
        (block("a", base_256(1 << 70), b"L") + END, "extended header at byte 0 is cut short or damaged"),
        (pax(b"x", b"size=-3") + FILE + END, "member 'a.jpg' has size '-3'"),
        (pax(b"x", b"size=" + b"9" * 5000) + FILE + END, "broken PAX header: member 'a.jpg' has size"),
        (pax(b"x", b"size=\xc2\xb2") + FILE + END, "broken PAX header: member 'a.jpg' has size"),
        (block("p", b"00000000012\0", b"x") + padded(b"99 path=a\n") + FILE + END, "broken PAX header at byte 0"),
        (block("p", b"00000000012\0", b"x") + padded(b"9999999999") + FILE + END, "broken PAX header at byte 0"),
        (FILE + pax(b"x", b"path=c.jpg") + END, "an extended header at the end has no member"),
        (block("a.jpg", b"3\0", b"S", magic=GNU) + padded(b"abc") + END, "'a.jpg' is stored as a sparse file"),
        (pax(b"x", b"GNU.sparse.size=9", b"GNU.sparse.numblocks=1") + FILE + END, "'a.jpg' is stored as a sparse"),
        (pax(b"x", b"GNU.sparse.map=0,3", b"GNU.sparse.size=9") + FILE + END, "'a.jpg' is stored as a sparse file"),
        (pax(b"x", b"GNU.sparse.major=1", b"GNU.sparse.name=c.jpg") + FILE + END, "'c.jpg' is .*; unpack the tar and"),
        (pax(b"g", b"GNU.sparse.major=1") + FILE + END, "'a.jpg' is stored as a sparse file"),
        (block("a.jpg", b"3\0", b"M", magic=GNU) + padded(b"abc") + END, "goes on from another volume"),
        (FILE + OTHER, "truncated, the end-of-archive mark is missing"),
        (FILE + END + OTHER, "truncated, the end-of-archive mark is missing"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DamagedError, match=rf"a\.tar: .*{message}"):
        list_members(tmp_path / "a.tar", LeftOut())


def test_what_is_left_out_takes_no_memory(tmp_path: Path) -> None:
    """However many members there are, five names of each reason are kept."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(1000):
            add(tar, f"{number}", type=tarfile.FIFOTYPE)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    left_out = LeftOut()
    list_members(tmp_path / "a.tar", left_out)
    assert str(left_out) == "left out: 1000 devices and pipes (0, 1, 2, 3, 4, ...)"
    assert LeftOut.from_json(left_out.to_json()) == left_out
    left_out.update(LeftOut.from_json(left_out.to_json()))
    assert len(left_out) == 2000
    assert str(LeftOut()) == "left out: "
    assert not LeftOut()
