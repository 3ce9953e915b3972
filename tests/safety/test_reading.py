"""JSON and archives of any size and shape: what they hold, or a ValueError."""

from __future__ import annotations

import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from mepa_ds.safety.reading import parse_array, parse_json, read_archive, read_json, read_json_object


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "nested too deep"),
        ("[" * 200 + "]" * 200, "nested more than 100"),
        ('{"a":' * 150 + "1" + "}" * 150, "nested more than 100"),
        ('{"a": NaN}', "NaN"),
        ("[1e5, -Infinity]", "Infinity"),
        ("9" * 5000, "beyond all floating-point numbers"),
        (b"\xff\xfe\xfd", "no UTF-8"),
        ("{", "Expecting"),
    ],
)
def test_bad_json(text: str | bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_json_is_what_it_was(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json_object(path) == {"a": 1}
    with pytest.raises(ValueError, match="more than the 7"):
        read_json(path, most_bytes=7)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not an object"):
        read_json_object(path)


@given(st_numpy.arrays(st.sampled_from(["u1", "<i8", ">f4", "S3", "?"]), st_numpy.array_shapes(min_dims=0, min_side=0)))
def test_arrays_are_what_numpy_reads(array: np.ndarray[Any, Any]) -> None:
    stored = io.BytesIO()
    np.save(stored, np.asarray(array, order="F"))
    ours, theirs = parse_array(stored.getvalue()), np.load(io.BytesIO(stored.getvalue()))
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    np.testing.assert_array_equal(ours, theirs)


def header(shape: str, dtype: str = "'|u1'", version: tuple[int, int] = (1, 0)) -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2 if version == (1, 0) else 4, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        header("(1000000000000,)") + b"1",
        header("(-1,)") + b"1",
        header(f"({10**30}, {10**30})"),
        header("(1,)", "'|O'") + b"1",
        header("(1,)", "[('a', '|O')]") + b"1",
        header("(1,)", "'|V0'"),
        header("()", "'<M8[ns]'"),
        header("(" * 5000),
        header("(1,)", "'|nonsense'"),
        header("(1,)", version=(9, 9)),
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{",
        b"",
        b"\x80\x04K\x01.",
    ],
)
def test_bad_arrays(data: bytes) -> None:
    with suppress(ValueError):  # NumPy's versions differ in what they take
        assert parse_array(data).nbytes <= len(data)


def archive(members: dict[str, bytes]) -> bytes:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return stored.getvalue()


def test_archives() -> None:
    stored = io.BytesIO()
    np.savez(stored, a=np.arange(3), b=np.array("text"))
    assert read_archive(stored.getvalue(), ["a"])["a"].tolist() == [0, 1, 2]
    assert str(read_archive(stored.getvalue())["b"]) == "text"
    with pytest.raises(ValueError, match="no array 'c'"):
        read_archive(stored.getvalue(), ["c"])


def test_a_bomb_is_not_unpacked() -> None:
    stored = archive({"a": header("(100000000,)") + bytes(100_000_000)})
    assert len(stored) < 200_000
    with pytest.raises(ValueError, match="more than the 1000000"):
        read_archive(stored, most_bytes=10**6)
    lying = stored.replace(
        (100_000_000 + len(header("(100000000,)"))).to_bytes(4, "little"), (500).to_bytes(4, "little")
    )
    with pytest.raises(ValueError, match=r"size|fit|CRC"):
        read_archive(lying, most_bytes=10**6)


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte(place: int, value: int) -> None:
    stored = bytearray(archive({"a": header("(3,)") + b"abc", "b": header("(2, 1)") + b"ab"}))
    stored[place % len(stored)] = value
    with suppress(ValueError):
        assert sum(array.nbytes for array in read_archive(bytes(stored)).values()) <= 10**6
