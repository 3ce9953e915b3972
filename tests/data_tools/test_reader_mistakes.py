"""Mistakes that people make with datasets: one line each, which names the thing and a remedy that works."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mepa_ds import files
from mepa_ds.data.shards.writer import MANIFEST_NAME
from mepa_ds.data_tools.build_shards import build
from mepa_ds.data_tools.merge_index import Scan
from mepa_ds.data_tools.readers import parquet as parquet_reader
from mepa_ds.data_tools.readers import tar_members
from mepa_ds.data_tools.readers.imagefolder import ImageFolder
from mepa_ds.data_tools.readers.parquet import Parquet
from mepa_ds.data_tools.readers.patterns import expand_braces
from mepa_ds.data_tools.readers.webdataset import WebDataset
from mepa_ds.errors import UserError
from tests.data.shard_fixtures import make_set
from tests.data_tools.build_fixtures import SYNSETS, images_of, labelled, make_folder, options, picture, write_parquet


@pytest.mark.parametrize("pattern", ["t-{0..3.tar", "t-0}.tar", "{", "https://host/{a,b}/{0..3.tar"])
def test_a_brace_without_its_other_half(tmp_path: Path, pattern: str) -> None:
    for use in (lambda: build(WebDataset(pattern), options(tmp_path / "out")), Scan(pattern, out=tmp_path / "out")):
        with pytest.raises(UserError, match=r"a brace has no other half; write \{0000\.\.0099\} for many, and \\{ or"):
            use()
    assert not (tmp_path / "out").exists()


def test_braces_that_belong_to_a_name(tmp_path: Path) -> None:
    make_set(tmp_path / "in", "images", [2])
    odd = tmp_path / "a{0.tar"
    odd.write_bytes((tmp_path / "in" / "shard-000000.tar").read_bytes())
    assert expand_braces(str(odd), "") == [str(odd)]
    assert expand_braces(r"https://host/a\{0.tar", "") == ["https://host/a{0.tar"]
    assert expand_braces("a-{08..11..2}.tar", "") == ["a-08.tar", "a-10.tar"]


def test_a_range_of_a_wrong_number() -> None:
    """All of its names would be made before the first is looked at."""
    with pytest.raises(UserError, match="stands for more than 1000000 names; is a number wrong"):
        expand_braces("{a,b}-{0000..9999}-{0..1000000000000}.tar", "--shards")


@pytest.mark.parametrize("make", [Parquet, lambda root: WebDataset(f"{root}/*.parquet")])
def test_links_of_a_hub_cache_that_lead_nowhere(tmp_path: Path, make: Any) -> None:
    (tmp_path / "train-00000-of-00001.parquet").symlink_to("../../blobs/gone")
    pytest.importorskip("pyarrow")
    with pytest.raises(
        UserError, match=r"-of-00001\.parquet: it is a link to \.\./\.\./blobs/gone, which is not there"
    ):
        build(make(tmp_path), options(tmp_path / "out"))


def test_a_class_folder_that_is_a_link_to_nowhere(tmp_path: Path) -> None:
    """Left out, it would shift the labels of those behind it."""
    make_folder(tmp_path / "in")
    (tmp_path / "in" / "n01441000").symlink_to("elsewhere")
    with pytest.raises(UserError, match=r"in/n01441000: it is a link to elsewhere, which is not there; mend or remove"):
        build(ImageFolder(tmp_path / "in"), options(tmp_path / "out"))


def test_files_of_a_class_that_cannot_be_read(tmp_path: Path) -> None:
    found = make_folder(tmp_path / "in")
    (tmp_path / "in" / SYNSETS[0] / "gone.jpg").symlink_to("blobs/1")
    os.mkfifo(tmp_path / "in" / SYNSETS[1] / "pipe.jpg")
    (tmp_path / "in" / SYNSETS[2] / "folder.jpg").mkdir()
    with pytest.raises(UserError, match=r"cannot be read: (it is a link to blobs/1|not a regular file).*--on-damaged"):
        build(ImageFolder(tmp_path / "in"), options(tmp_path / "out"))
    index = build(ImageFolder(tmp_path / "in"), options(tmp_path / "out", on_damaged="skip"))
    assert index is not None
    assert sorted(images_of(tmp_path / "out")) == sorted(labelled(found))
    skipped = sorted(message for shard in index.shards for message in shard.skipped)
    assert [message.partition(": cannot be read: ")[2] for message in skipped] == [
        "it is a link to blobs/1, which is not there; mend that",
        "not a regular file; mend that",
    ]


def test_a_class_whose_name_is_not_utf8(tmp_path: Path) -> None:
    found = make_folder(tmp_path / "in")
    odd = os.fsencode(tmp_path / "in") + b"/caf\xe9"
    os.rename(tmp_path / "in" / SYNSETS[0], odd)
    with pytest.raises(UserError, match=r"the class name 'caf\\udce9' is not UTF-8, .*; rename the class"):
        build(ImageFolder(tmp_path / "in"), options(tmp_path / "out"))
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    os.rename(odd, tmp_path / "in" / SYNSETS[0])
    build(ImageFolder(tmp_path / "in"), options(tmp_path / "out"))
    assert sorted(images_of(tmp_path / "out")) == sorted(labelled(found))


def test_a_validation_folder_that_lacks_a_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val", per_class=2)
    for image in (tmp_path / "val" / SYNSETS[0]).iterdir():
        image.unlink()
    (tmp_path / "val" / SYNSETS[0]).rmdir()
    build(ImageFolder(tmp_path / "train"), options(tmp_path / "out"))
    (tmp_path / "names.txt").write_text("\n".join(SYNSETS) + "\n\n")
    for number, classes in enumerate((tmp_path / "out", tmp_path / "names.txt")):
        index = build(ImageFolder(tmp_path / "val", classes), options(tmp_path / f"val{number}"))
        assert index is not None
        assert index.classes == SYNSETS
        assert sorted({label for _, label in images_of(tmp_path / f"val{number}")}) == [1, 2]
    assert f"1 of 3 classes have no images here ({SYNSETS[0]})" in capsys.readouterr().out
    for names, message in (
        (SYNSETS[1:2], rf"1 folders are none of the 1 classes of .*\({SYNSETS[2]}\); remove them"),
        (("a", "", "b"), r"--classes: .*names\.txt: line 2 is empty"),
        (("a", "b", "a"), r"--classes: .*names\.txt: 'a' is there more than once"),
        ((), r"--classes: .*names\.txt: names no classes"),
    ):
        (tmp_path / "names.txt").write_text("\n".join(names))
        with pytest.raises(UserError, match=message):
            build(ImageFolder(tmp_path / "val", tmp_path / "names.txt"), options(tmp_path / "other"))


def write_labels(path: Path, labels: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    images = [{"bytes": picture(number), "path": None} for number in range(len(labels))]
    parquet.write_table(pyarrow.table({"image": images, "label": labels, "other": [1, 1]}), path)


@pytest.mark.parametrize(("labels", "expected"), [([1.0, 0.0], [1, 0]), ([True, False], [1, 0]), ([3, 0], [3, 0])])
def test_parquet_labels_of_other_types(tmp_path: Path, labels: Any, expected: list[int]) -> None:
    write_labels(tmp_path / "in" / "a.parquet", labels)
    build(Parquet(tmp_path / "in"), options(tmp_path / "out"))
    found = images_of(tmp_path / "out")
    assert sorted(found) == sorted((picture(number), label) for number, label in enumerate(expected))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["cat", "dog"],
            r"column 'label' holds string values, but labels are numbers .*class_encode_column\('label'\)",
        ),
        ([[0], [1]], "column 'label' holds list<.*> values"),
        ([0.5, 1.0], r"row 0: label 0\.5 is no whole number; mend it"),
        ([float("nan"), 1.0], "row 0: label nan is no whole number"),
        ([None, 1], "row 0: has no label; is this a split without labels"),
    ],
)
def test_parquet_labels_that_are_none(tmp_path: Path, labels: Any, message: str) -> None:
    """The remedy is to give another column, which works although rows were copied already."""
    write_labels(tmp_path / "in" / "a.parquet", labels)
    with pytest.raises(UserError, match=message):
        build(Parquet(tmp_path / "in"), options(tmp_path / "out"))
    build(Parquet(tmp_path / "in", label_column="other"), options(tmp_path / "out"))
    assert [label for _, label in images_of(tmp_path / "out")] == [1, 1]


def test_rows_copied_from_another_column_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a build that was killed after it had copied everything."""
    write_labels(tmp_path / "in" / "a.parquet", [0, 0])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mepa_ds.data_tools.readers.parquet.WebDataset", killed)
        with pytest.raises(KeyboardInterrupt):
            build(Parquet(tmp_path / "in"), options(tmp_path / "out"))
    assert (tmp_path / "out" / ".scratch" / "shard-000000.tar").exists()
    build(Parquet(tmp_path / "in", label_column="other"), options(tmp_path / "out"))
    assert [label for _, label in images_of(tmp_path / "out")] == [1, 1]


@pytest.mark.parametrize(
    "note", [b"{", b"[]", b'{"info": null}', b'{"info": {"features": {"label": {"names": {"0": "a"}}}}}']
)
def test_notes_of_classes_that_cannot_be_read(tmp_path: Path, note: bytes) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", [(picture(0), 0), (picture(1), 1)])
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "in" / "a.parquet").replace_schema_metadata({b"huggingface": note})
    parquet.write_table(table, tmp_path / "in" / "a.parquet")
    index = build(Parquet(tmp_path / "in"), options(tmp_path / "out"))
    assert index is not None
    assert index.classes == ("0", "1")


class Passing:
    """A function whose first calls fail, as a network file system does at times."""

    def __init__(self, function: Any, code: int = errno.ESTALE, fails: int = 1):
        self._function, self._code, self._fails = function, code, fails
        self.calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls <= self._fails:
            raise OSError(self._code, os.strerror(self._code))
        return self._function(*arguments)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mepa_ds.files._PAUSES", (0, 0))


def test_what_a_file_server_gets_over_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "folder")
    make_set(tmp_path / "set", "images", [5])
    write_labels(tmp_path / "rows" / "a.parquet", [0, 1])
    cases: list[tuple[str, Any, Any, int]] = [
        ("mepa_ds.files._read_file", files._read_file, ImageFolder(tmp_path / "folder"), len(folder)),
        ("mepa_ds.data_tools.readers.tar_members._read", tar_members._read, WebDataset(str(tmp_path / "set")), 5),
        ("mepa_ds.data_tools.readers.parquet._batches", parquet_reader._batches, Parquet(tmp_path / "rows"), 2),
    ]
    for number, (name, function, reader, count) in enumerate(cases):
        with monkeypatch.context() as patch:
            passing = Passing(function, (errno.ESTALE, errno.EIO, errno.ESTALE)[number])
            patch.setattr(name, passing)
            index = build(reader, options(tmp_path / f"out{number}"))
        assert index is not None
        assert index.num_samples == count
        assert passing.calls >= 2


def test_what_stays_unreadable_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "in", per_class=1)
    always = Passing(None, errno.EIO, fails=9)
    monkeypatch.setattr("mepa_ds.files._read_file", always)
    with pytest.raises(UserError, match=r"cannot be read: Input/output error; mend that; or run again with --on-dama"):
        build(ImageFolder(tmp_path / "in"), options(tmp_path / "out"))
    assert always.calls == 3
