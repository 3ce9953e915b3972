"""What a sample is: the same for build, scan and loader, and all that is none is counted."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mepa_ds.data.images import images_once
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.offset_index import scan_tar
from mepa_ds.data.shards.samples import image_samples, is_hidden, split_member_name
from mepa_ds.data_tools.build_shards import build
from mepa_ds.data_tools.merge_index import Scan
from mepa_ds.data_tools.readers.webdataset import WebDataset
from mepa_ds.data_tools.show_shards import Options as ShowOptions
from mepa_ds.data_tools.show_shards import contact_sheet
from mepa_ds.data_tools.verify_shards import Options as VerifyOptions
from mepa_ds.data_tools.verify_shards import verify
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.images.decoding import is_image_name
from tests.data.shards.tar_fixtures import add
from tests.data_tools.build_fixtures import images_of, options, picture


def write(path: Path, names: Sequence[str]) -> Path:
    """A tar of pictures, each another one, and labels 0."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            add(tar, name, b"0" if name.endswith("cls") else picture(number))
    return path


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


def test_names_of_images_and_hidden_names() -> None:
    assert all(map(is_image_name, ("a.jpg", "d.x/a.b.JPEG", "./a.tif", "a.WebP")))
    assert not any(map(is_image_name, ("jpg", "d.jpg/a", "a.jfif", "a.npy", "a.jpg.txt", "a.jpg/")))
    assert all(map(is_hidden, ("._a.jpg", "d/.a", "__MACOSX/a.jpg", "./.git/a.jpg", "a/__MACOSX/b")))
    assert not any(map(is_hidden, ("a.jpg", "./a.jpg", "d.x/a", "MACOSX/a", "../a")))


parts = st.sampled_from(["a", "b", "1"])
extensions = st.sampled_from(
    ["jpg", "JPG", "png", "cls", "cls", "json", "seg.png", "5.jpg", "5.cls", "x.y.tif", "npy", ""]
)
names = st.builds(
    lambda folder, key, extension: f"{folder}{key}.{extension}".rstrip("."),
    st.sampled_from(["", "", "d/", "d.x/", "__MACOSX/", "._"]),
    parts,
    extensions,
)


@settings(max_examples=200, deadline=None)
@given(chosen=st.lists(names, min_size=1, max_size=8, unique=True))
def test_build_scan_and_loader_agree_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "samples.tar"
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(chosen):
            add(tar, name, bytes(number + 1))
    built_left, built, scanned = LeftOut(), None, None
    with suppress(DamagedError):
        built = image_samples(path, built_left, dots_in_keys=True)
    with suppress(DamagedError):
        scanned = scan_tar(path, "images")
    if built is None:
        assert scanned is None  # what one refuses, the other does not take for something else
        return
    assert sum(len(members) for members in built.values()) + len(built_left) == len(chosen)
    if scanned is None:
        return
    assert [key.encode() for key in built] == scanned.keys_N.tolist()
    assert scanned.left_out == built_left
    for row, members in enumerate(built.values()):
        sizes = dict(zip(scanned.extensions, scanned.sizes_NM[row].tolist(), strict=True))
        assert {extension: size for extension, size in sizes.items() if size >= 0} == {
            extension: member.size for extension, (_, member) in members.items()
        }


def test_all_tools_say_what_they_leave_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ["0.JPG", "0.cls", "d/1.tif", "d/1.cls"]
    write(tmp_path / "in" / "0.tar", [*kept[:2], "0.json", "classes.txt", "2.cls", "__MACOSX/3.jpg", "jpg", *kept[2:]])
    write(tmp_path / "in" / "._0.tar", kept)
    write(tmp_path / "in" / "1.tar.gz", kept)
    reasons = [
        "2 files or folders that are no shards (._0.tar, 1.tar.gz)",
        "1 hidden names, as macOS packs them beside files (__MACOSX/3.jpg)",
        "3 members that are neither image nor label (0.json, classes.txt, jpg)",
        "1 labels without an image (2.cls)",
    ]
    assert len(ShardSet(tmp_path / "in")) == 2
    printed = capsys.readouterr().err
    assert all(reason in printed for reason in reasons)
    build(WebDataset(str(tmp_path / "in")), options(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert all(reason in printed for reason in reasons)
    for _ in range(2):  # also when the headers are not read again
        assert Scan(str(tmp_path / "in"), workers=0)().num_samples == 2
        printed = capsys.readouterr().out
        assert all(reason in printed for reason in reasons)
    assert verify(VerifyOptions((tmp_path / "in",), workers=0))
    printed = capsys.readouterr().out
    assert all(reason in printed for reason in reasons[1:])
    batches = list(images_once(tmp_path / "in", batch_size=2, image_side=16))
    assert batches[0].keys == ("0", "d/1")
    assert contact_sheet(ShowOptions(tmp_path / "in", count=2, side=16)).pixels_HW3.size


def test_two_images_in_a_sample_are_refused_everywhere(tmp_path: Path) -> None:
    """Which of them is the picture and which a mask, no rule can know."""
    write(tmp_path / "in" / "0.tar", ["0.png", "0.jpg", "0.cls"])
    message = r"0\.tar: sample '0': has several images, \.jpg and \.png; keep one .*tar --delete --wildcards '\*\.png'"
    with pytest.raises(UserError, match=message):
        build(WebDataset(str(tmp_path / "in")), options(tmp_path / "out"))
    with pytest.raises(UserError, match=message):
        Scan(str(tmp_path / "in"), workers=0)()
    with pytest.raises(UserError, match=message):
        ShardSet(tmp_path / "in")


def test_dots_in_names(tmp_path: Path) -> None:
    """Where each image has its label by the last dot, and none by the first, a build takes them; others say how."""
    names = [
        f"d/{number:04d}.{number % 7}.{number}.{extension}" for number in range(50) for extension in ("jpg", "cls")
    ]
    write(tmp_path / "in" / "0.tar", names)
    message = r"'d/0000\.0\.0' has a dot, but a key ends at the first dot .*mepa data build webdataset"
    with pytest.raises(UserError, match=message):
        Scan(str(tmp_path / "in"), workers=0)()
    with pytest.raises(UserError, match=message):
        ShardSet(tmp_path / "in")
    assert not list((tmp_path / "in").glob("*.npz"))
    build(WebDataset(str(tmp_path / "in")), options(tmp_path / "out"))
    assert sorted(images_of(tmp_path / "out")) == sorted((picture(2 * number), 0) for number in range(50))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["1.left.jpg", "1.right.jpg", "1.cls"],
            r"sample '1' has no image, only \['cls', 'left.jpg', 'right.jpg'\]: a",
        ),
        (["1.jpg", "1.cls", "2.5.jpg", "2.cls"], "sample '2' has no image, .* give the files names with one dot"),
        (["1.seg.png", "2.seg.png"], "sample '1' has no image, .* a key ends at the first dot of the file name"),
    ],
)
def test_dots_that_no_rule_explains(tmp_path: Path, names: list[str], message: str) -> None:
    path = write(tmp_path / "0.tar", names)
    with pytest.raises(UserError, match=message):
        WebDataset(str(path)).open(None)
    with pytest.raises(UserError, match=message):
        scan_tar(path, "images")


def test_members_beside_image_and_label_are_named(tmp_path: Path) -> None:
    """Masks as webdataset names them, and a second picture under the first one's key."""
    left_out = LeftOut()
    path = write(tmp_path / "0.tar", ["0.jpg", "0.seg.png", "0.cls", "0.5.jpg", "0.meta.json"])
    ((key, members),) = image_samples(path, left_out, dots_in_keys=True).items()
    assert (key, list(members)) == ("0", ["jpg", "cls"])
    assert "2 images or labels with more dots in their names, whose keys end at the first (0.seg.png, 0.5" in str(
        left_out
    )


def test_samples_that_cannot_be_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ["x.jpg", "y.jpg", "x.cls"])
    with pytest.raises(DamagedError, match="members of sample 'x' do not lie side by side; make the shard again"):
        scan_tar(path, "images")
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        add(tar, "caf\xe9.jpg")
    with pytest.raises(DamagedError, match=r"sample 'caf.*udce9' is not UTF-8; .*mepa data build webdataset"):
        scan_tar(tmp_path / "b.tar", "images")
    for path in (write(tmp_path / "c.tar", ["a.jpg", "a.jpg"]), write(tmp_path / "d.tar", ["a.jpg", "a.JPG"])):
        with pytest.raises(DamagedError, match=r"'a' has two members \.jpg: it comes twice"):
            scan_tar(path, "images")


def test_tables_stay_small(tmp_path: Path) -> None:
    """An offset index has a column for each kind of member: names with dots would make as many as there are samples."""
    path = write(tmp_path / "a.tar", [f"a.{number}.npy" for number in range(40)])
    with pytest.raises(DamagedError, match=r"has members of 40 kinds .* a key ends at the first dot"):
        scan_tar(path, "tokens")


def test_shards_without_images_are_no_image_set(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", ["0.txt", "1.cls"])
    with pytest.raises(
        UserError, match=r"no images found \(left out: .*0\.txt.*; 1 labels without an image \(1\.cls\)"
    ):
        Scan(str(tmp_path), workers=0)()
    with pytest.raises(UserError, match="no images found"):
        build(WebDataset(str(tmp_path)), options(tmp_path / "out"))
