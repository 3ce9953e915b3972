"""Pictures of strangers: formats by a list, and bounded memory and time, whatever other libraries have set."""

from __future__ import annotations

import ast
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from mepa_ds.errors import DamagedError
from mepa_ds.images.decoding import decode_image, size_of
from mepa_ds.safety.pictures import MOST_PIXELS

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "mepa_ds").rglob("*.py"), *(ROOT / "data_tools").rglob("*.py")])
OPENERS = ("imread", "read_image", "decode_image_file", "decode_jpeg", "decode_png", "autodecode", "imagehandler")


def test_pictures_are_opened_in_one_place() -> None:
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
                if called in OPENERS or (
                    called == "open" and ast.unparse(node.func) in ("Image.open", "PIL.Image.open")
                ):
                    found.add(str(path.relative_to(ROOT)))
    assert found == {"mepa_ds/safety/pictures.py"}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png_of(width: int, height: int, *chunks: bytes, rows: bytes = b"\0\0") -> bytes:
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def fields(count: int, size: int, kind: int = 7) -> bytes:
    """TIFF's fields, each of which claims all that follows them."""
    first = 8 + 2 + 12 * count + 4
    entries = b"".join(struct.pack("<HHLL", 0x8900 + number, kind, size, first) for number in range(count))
    return b"II*\0" + struct.pack("<LH", 8, count) + entries + bytes(4 + size)


def tiled(side: int) -> bytes:
    """An 8 x 8 TIFF with one tile of `side` x `side`."""
    data = zlib.compress(bytes(1 << 20))
    values = [(256, 8), (257, 8), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 200),
              (325, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in values)
    head = b"II*\0" + struct.pack("<LH", 8, len(values)) + entries + bytes(4)
    return head.ljust(200, b"\0") + data


def jpeg(*segments: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    return data[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments) + data[2:]


def gif_of(screen: tuple[int, int], frame: tuple[int, int], blocks: bytes = b"") -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    control = b"!\xf9\x04" + bytes([2 << 2]) + b"\0\0\0\0"  # Pillow fills such a frame as it opens it
    return head + blocks + control + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0;"


def webp_of(side: int) -> bytes:
    body = b"VP8X" + struct.pack("<L", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "WEBP", lossless=True)
    body += buffer.getvalue()[12:]
    return b"RIFF" + struct.pack("<L", len(body) + 4) + b"WEBP" + body


EXIF = fields(30_000, 300_000)
BOMBS = {
    "a PNG's header": png_of(60_000, 60_000),
    "a BMP's header": b"BM" + struct.pack("<LLLLllHHLLllLL", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "a PPM's header": b"P6 60000 60000 255 " + bytes(100),
    "a GIF's screen": gif_of((65_535, 65_535), (8, 8)),
    "a GIF's frame": gif_of((8, 8), (65_535, 65_535)),
    "a GIF's comments": gif_of((8, 8), (8, 8), b"!\xfe\x01 \0" * 1_000_000),
    "a WebP's canvas": webp_of(16_383),
    "a TIFF's size": tiled(8).replace(struct.pack("<HHLL", 256, 4, 1, 8), struct.pack("<HHLL", 256, 4, 1, 1 << 30)),
    "a TIFF's tile": tiled(40_000),
    "a TIFF's fields": fields(30_000, 300_000),
    "a JPEG's fields": jpeg(*(b"Exif\0\0" + EXIF[place : place + 60_000] for place in range(0, len(EXIF), 60_000))),
}
BEARABLE = {
    "a PNG's fields": png_of(1, 1, chunk(b"eXIf", EXIF)),
    "a PNG's texts": png_of(1, 1, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20)))] * 20),
    "a PNG's profile": png_of(1, 1, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 28)))),
}
SCRIPT = """
import pickle, sys, time
from PIL import Image
Image.MAX_IMAGE_PIXELS = None
from mepa_ds.images.decoding import decode_image, size_of
from mepa_ds.machine import peak_resident_bytes
for name, data in pickle.load(sys.stdin.buffer).items():
    for read in (decode_image, size_of):
        began = time.process_time()
        try:
            read(data, "x")
            said = "whole"
        except ValueError as error:
            said = str(error)
        peak = peak_resident_bytes() >> 20
        print(name, read.__name__, f"{peak} {time.process_time() - began:.1f}", said, sep="|")
"""


def test_bombs_are_refused_in_bounded_time_and_memory() -> None:
    """Also where another library has lifted Pillow's own limit."""
    import pickle

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=pickle.dumps(BOMBS | BEARABLE), capture_output=True, check=True, cwd=ROOT
    )
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 2 * len(BOMBS | BEARABLE)
    for line in lines:
        name, _, costs, said = line.split("|")
        peak, seconds = costs.split()
        assert int(peak) < 700, line
        assert float(seconds) < 5, line
        if name in BOMBS:
            assert said.startswith("x: "), line
            assert "too large" in said or "damaged" in said or "not a readable image" in said, line


def test_the_limit_itself_needs_no_lifted_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    side = int(MOST_PIXELS**0.5)
    assert size_of(png_of(side, side), "x") == (side, side)
    with pytest.raises(DamagedError, match=r"x: the image is too large: 8192 x 8193 pixels, more than 67108864"):
        size_of(png_of(side, side + 1), "x")


def test_an_orientation_is_still_found_in_fields_that_are_sane() -> None:
    exif = Image.Exif()
    exif[274] = 6
    data = jpeg(exif.tobytes())
    assert decode_image(data, "x").size == (8, 8)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4)).save(buffer, "PNG", exif=exif)
    assert decode_image(buffer.getvalue(), "x").size == (4, 8)


@pytest.mark.parametrize("name", ["0.jpg", "0.png", "0.eps"])
def test_no_other_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mark, program = tmp_path / "ran", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho ran >{mark}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(DamagedError, match="cannot identify its format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n", name)
    assert not mark.exists()
